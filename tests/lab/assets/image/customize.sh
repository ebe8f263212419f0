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
