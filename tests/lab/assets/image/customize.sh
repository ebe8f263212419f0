#!/bin/sh
# Last step of the guest image: runs outside the new root, whose path is $1.
set -eu
root=$1

# The disk is one file system without a partition table.
echo '/dev/vda / ext4 defaults,errors=remount-ro 0 1' >"$root/etc/fstab"

# Jobs by the calendar have no place in a guest whose clock jumps when a snapshot is restored.
for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
	e2scrub_reap.service fstrim.timer logrotate.timer man-db.timer systemd-tmpfiles-clean.timer; do
	chroot "$root" systemctl mask --quiet "$unit"
done

# Its two hundred profiles take half a minute to load in emulation; Docker loads its own by itself.
chroot "$root" systemctl mask --quiet apparmor.service

# LVM, md and btrfs hold what udev finds on a disk, as on a host that has them. What they do besides
# is of no use here and costs every boot: monitors, checks by the calendar, a larger initial file
# system that looks for arrays and volume groups to find the root in.
for unit in lvm2-monitor.service mdcheck_start.timer mdcheck_continue.timer \
	mdmonitor-oneshot.timer mdmonitor.service; do
	chroot "$root" systemctl mask --quiet "$unit"
done
rm -f "$root"/usr/share/initramfs-tools/hooks/lvm2 "$root"/usr/share/initramfs-tools/hooks/mdadm \
	"$root"/usr/share/initramfs-tools/hooks/btrfs

# As in a cloud image: keys and the machine's identity are made at the first boot.
rm -f "$root"/etc/ssh/ssh_host_*
: >"$root/etc/machine-id"
: >"$root/etc/hostname"

chroot "$root" systemctl enable --quiet systemd-networkd.service systemd-resolved.service
chroot "$root" update-initramfs -u -k all

# The first boot has nothing to catch up with.
touch -r "$root/usr" "$root/etc/.updated" "$root/var/.updated"
rm -f "$root/etc/apt/apt.conf.d/99mmdebstrap"
rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*.bin
