//! The data volume's disk is not what it should be: it carries what somebody else put there, it
//! fails, it answers no more, it comes under another name, or the host has forgotten that it is its
//! own. A disk that is not proven blank keeps every byte, which is looked at from outside.

use super::host;
use crate::cloud::{Instance, Volume};
use crate::disk;
use crate::guest::Guest;
use crate::qemu::INSTANCE_ID;
use crate::stage::Stage;
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

/// Long enough for a run in emulation, that of a cold boot included.
const RUN: Duration = Duration::from_secs(300);

/// Something that can be on a disk.
struct Kind {
    /// What it is.
    what: &'static str,
    /// Who makes it.
    make: Make,
    /// What the refusal calls it; one of these.
    named: &'static [&'static str],
}

/// How a disk gets its content.
enum Make {
    /// By a script in the guest, which finds the disk as `$d` and leaves nobody using it.
    Inside(&'static str),
    /// By writing into its file.
    Outside(fn(&File) -> std::io::Result<()>),
}

/// Partition tables, parts of something larger, and what nothing recognises.
const TABLES: [Kind; 7] = [
    Kind {
        what: "GPT",
        make: Make::Inside("printf 'label: gpt\\n,100M,L\\n,,L\\n' | sfdisk -q $d"),
        named: &["gpt"],
    },
    Kind {
        what: "MBR",
        make: Make::Inside("printf 'label: dos\\n,100M,83\\n,,83\\n' | sfdisk -q $d"),
        named: &["dos"],
    },
    Kind {
        what: "LVM",
        make: Make::Inside(
            "vgcreate -qy records $d && lvcreate -qy -L 64M -n patients records && \
             echo precious >/dev/records/patients && vgchange -qan records",
        ),
        named: &["LVM2_member"],
    },
    Kind {
        what: "LUKS",
        make: Make::Inside(
            "printf secret | cryptsetup -q luksFormat --pbkdf pbkdf2 --pbkdf-force-iterations 1000 $d -",
        ),
        named: &["crypto_LUKS"],
    },
    Kind {
        what: "md",
        make: Make::Inside(
            "mdadm --create /dev/md/records --quiet --level=1 --raid-devices=2 --metadata=1.2 \
             --run --force $d missing && mdadm --stop --quiet /dev/md/records",
        ),
        named: &["linux_raid_member"],
    },
    Kind { what: "ZFS", make: Make::Outside(zfs_labels), named: &["zfs_member"] },
    Kind {
        what: "random bytes in the middle",
        make: Make::Outside(random_bytes),
        named: &["nothing recognises"],
    },
];

/// Filesystems, and what is left of one.
const FILESYSTEMS: [Kind; 5] = [
    Kind {
        what: "somebody's ext4",
        make: Make::Inside("mkfs.ext4 -q -L patients -d /etc/cloud $d"),
        named: &["ext4"],
    },
    Kind { what: "xfs", make: Make::Inside("mkfs.xfs -q -K $d"), named: &["xfs"] },
    Kind { what: "btrfs", make: Make::Inside("mkfs.btrfs -q -K $d"), named: &["btrfs"] },
    Kind { what: "swap", make: Make::Inside("mkswap $d >/dev/null"), named: &["swap"] },
    Kind {
        what: "an ext4 with data after wipefs",
        make: Make::Inside("mkfs.ext4 -q -d /etc/cloud $d && wipefs -qa $d"),
        named: &["nothing recognises", "own probe"],
    },
];

/// ZFS's four labels of 256 KiB, two at the beginning and two at the end of the disk, as far as a
/// probe looks: the pool's name and ids 16 KiB into each, uberblocks from 128 KiB on (OpenZFS, "ZFS
/// On-Disk Specification", chapter 1).
fn zfs_labels(file: &File) -> std::io::Result<()> {
    const LABEL: u64 = 256 << 10;
    let size = file.metadata()?.len();
    // XDR, big endian, unique names.
    let mut names = vec![1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
    let numbers =
        [("version", 5000), ("state", 0), ("txg", 4), ("pool_guid", 0x5eed), ("guid", 0x5eee)];
    for (name, number) in numbers {
        names.extend(zfs_pair(name, 8, &u64::to_be_bytes(number)));
    }
    names.extend(zfs_pair("name", 9, b"\0\0\0\x08patients"));
    names.extend([0; 8]);
    for label in [0, LABEL, size - 2 * LABEL, size - LABEL] {
        file.write_all_at(&names, label + (16 << 10))?;
        for slot in 0..8_u64 {
            let mut uberblock = [0_u8; 40];
            uberblock[..8].copy_from_slice(&0x00ba_b10c_u64.to_le_bytes());
            uberblock[8..16].copy_from_slice(&5000_u64.to_le_bytes());
            uberblock[16..24].copy_from_slice(&(slot + 1).to_le_bytes());
            file.write_all_at(&uberblock, label + (128 << 10) + slot * 1024)?;
        }
    }
    Ok(())
}

/// A named value in a ZFS label: the sizes of the pair, its name, its type, how many, the value.
fn zfs_pair(name: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    let number = |n: usize| u32::try_from(n).unwrap_or_default().to_be_bytes();
    let padded = name.len().next_multiple_of(4);
    let size = 12 + padded + 8 + value.len();
    let mut pair = [number(size), number(size), number(name.len())].concat();
    pair.extend(name.bytes().chain(std::iter::repeat_n(0, padded - name.len())));
    pair.extend([kind.to_be_bytes(), number(1)].concat());
    pair.extend(value);
    pair
}

/// What an encrypted disk without a header looks like, in one place.
fn random_bytes(file: &File) -> std::io::Result<()> {
    let mut bytes = vec![0; 2 << 20];
    std::io::Read::read_exact(&mut File::open("/dev/urandom")?, &mut bytes)?;
    file.write_all_at(&bytes, (517 << 20) + 4096)
}

pub(super) fn tables(stage: &mut Stage) -> Result<()> {
    each_is_refused(stage, &TABLES)
}

pub(super) fn filesystems(stage: &mut Stage) -> Result<()> {
    each_is_refused(stage, &FILESYSTEMS)
}

/// Puts each kind on the data volume, attaches the volume afresh, and expects a refusal that names
/// the kind and leaves the disk as it was.
fn each_is_refused(stage: &mut Stage, kinds: &[Kind]) -> Result<()> {
    let volume = host::volume();
    stage.announce(&volume, host::DEVICE)?;
    for kind in kinds {
        let file = blank(stage, &volume)?;
        match kind.make {
            Make::Outside(write) => write(&File::options().write(true).open(&file)?)?,
            Make::Inside(script) => {
                stage.plug(&volume)?;
                let guest = stage.guest()?;
                let device = device(guest, &volume)?;
                let script = format!("set -e; d={device}; {script}; sync; udevadm settle");
                guest.sh(&script).with_context(|| format!("making {}", kind.what))?;
                unplug(stage, &volume)?;
            }
        }
        refused(stage, &volume, kind.named).with_context(|| kind.what)?;
        unplug(stage, &volume)?;
    }
    Ok(())
}

/// Plugs the volume, lets the host look at it and hold what it holds, runs hostagent, and expects
/// that it refuses the disk, says one of `named`, and writes nothing to it.
fn refused(stage: &mut Stage, volume: &Volume, named: &[&str]) -> Result<()> {
    let file = stage.plug(volume)?;
    let guest = stage.guest()?;
    let device = device(guest, volume)?;
    guest.sh("udevadm settle; sync")?;
    let before = disk::hash(&file)?;
    let (status, filesystem) = provision_disk(guest)?;
    ensure!(status == 1, "hostagent ended with {status}: {filesystem:#}");
    expect_refusal(&filesystem, "fail", named)?;
    expect_untouched(guest, &device)?;
    ensure!(disk::hash(&file)? == before, "the disk was written to");
    Ok(())
}

/// Runs hostagent as far as the mount of the data volume. Returns its exit status and what it says
/// of `data-filesystem`.
pub(super) fn provision_disk(guest: &mut Guest) -> Result<(i64, Value)> {
    let ended = host::hostagent(guest, "provision --only data-mount --format json")?;
    let report: Value = serde_json::from_str(&ended.stdout)
        .with_context(|| format!("reading the report\n{}{}", ended.stdout, ended.stderr))?;
    ensure!(report["ready"] != true, "a part of the controls made the host ready: {report:#}");
    let controls = report["controls"].as_array().map(Vec::as_slice).unwrap_or_default();
    let found = controls.iter().find(|control| control["id"] == "data-filesystem");
    Ok((ended.status, found.context("no verdict on data-filesystem")?.clone()))
}

/// Expects a verdict on `data-filesystem` after which nothing was done, and a word in what it says.
pub(super) fn expect_refusal(filesystem: &Value, verdict: &str, named: &[&str]) -> Result<()> {
    let said = filesystem["verdict"].to_string() + &filesystem["refusal"].to_string();
    ensure!(filesystem["verdict"]["status"] == verdict, "not {verdict}: {filesystem:#}");
    ensure!(named.iter().any(|n| said.contains(n)), "{named:?} is not named: {filesystem:#}");
    ensure!(filesystem.get("steps").is_none(), "something was done: {filesystem:#}");
    Ok(())
}

/// Expects that nothing of a disk is mounted, nor anything on the mount point, and no readiness.
pub(super) fn expect_untouched(guest: &mut Guest, device: &str) -> Result<()> {
    guest.sh(&format!("sync; ! findmnt -n /data && ! findmnt -n {device}")).context("mounted")?;
    guest.sh("! test -e /run/hostagent/ready").context("the host is ready").map(drop)
}

/// The kernel's name of a volume's disk, once udev has looked at it.
pub(super) fn device(guest: &mut Guest, volume: &Volume) -> Result<String> {
    let link = format!("readlink -e /dev/disk/by-id/nvme-*_{}", volume.serial());
    Ok(guest.until(&link, Duration::from_secs(20))?.trim().to_owned())
}

/// Makes the file of an unplugged volume blank.
pub(super) fn blank(stage: &Stage, volume: &Volume) -> Result<std::path::PathBuf> {
    let file = stage.disk_of(volume).file;
    disk::create(&file, volume.size)?;
    Ok(file)
}

/// Detaches a volume's disk; what the host made of it by itself (volume groups, arrays) goes first.
pub(super) fn unplug(stage: &mut Stage, volume: &Volume) -> Result<()> {
    stage.guest()?.sh("for held in /sys/block/nvme*/holders/*; do \
         case $held in */md*) mdadm --stop /dev/${held##*/};; */dm-*) vgchange -qan;; esac; done 2>&1")?;
    stage.vm()?.unplug(&volume.serial())?;
    stage.guest()?.until(
        &format!("! ls /dev/disk/by-id/nvme-*_{} 2>/dev/null", volume.serial()),
        Duration::from_secs(20),
    )?;
    Ok(())
}

pub(super) fn clone(stage: &mut Stage) -> Result<()> {
    // hostagent's own filesystem, label and all, but made on another volume: a snapshot of it.
    let other = Volume::new("vol-0bbbbbbbbbbbbbbb0", true);
    let from = stage.attach(&other, host::DEVICE)?;
    let guest = stage.guest()?;
    device(guest, &other)?;
    let made = host::hostagent(guest, "provision --only data-filesystem")?;
    ensure!(made.status == 0, "{made:?}");
    guest.sh("sync")?;
    unplug(stage, &other)?;
    stage.cloud.detach(&other.id)?;
    let volume = host::volume();
    crate::cache::copy_disk(&from, &stage.disk_of(&volume).file)?;
    host::await_signals(stage)?;
    let file = stage.attach(&volume, host::DEVICE)?;
    let before = disk::hash(&file)?;
    host::provision(stage.guest()?, RUN)?;
    host::expect_not_ready(
        stage,
        &[("data-filesystem", "fail"), ("data-mount", "unknown"), ("docker-storage", "unknown")],
    )?;
    host::expect_signals(stage, &["FAILURE"], &["ABANDON"])?;
    let guest = stage.guest()?;
    let device = device(guest, &volume)?;
    expect_untouched(guest, &device)?;
    let (_, filesystem) = provision_disk(guest)?;
    expect_refusal(&filesystem, "fail", &["hostagent-data"])?;
    ensure!(disk::hash(&file)? == before, "the disk was written to");
    Ok(())
}

pub(super) fn pci_order(stage: &mut Stage) -> Result<()> {
    let (data, foreign) = (host::volume(), Volume::new("vol-0fffffffffffffff0", true));
    stage.announce(&data, host::DEVICE)?;
    stage.announce(&foreign, "/dev/sdg")?;
    blank(stage, &data)?;
    let file = blank(stage, &foreign)?;
    random_bytes(&File::options().write(true).open(&file)?)?;
    let before = disk::hash(&file)?;
    let mut names = Vec::new();
    for [first, second] in [[&foreign, &data], [&data, &foreign]] {
        stage.power_cycle_with(INSTANCE_ID, &[first])?;
        // Of disks that are there together the kernel names now one and now the other first,
        // whatever their slots are: this one is plugged when that one has its name.
        stage.plug(second)?;
        let guest = stage.guest()?;
        host::settled(guest, RUN)?;
        names.push(device(guest, &data)?);
        host::expect_ready(stage)?;
        stage.guest()?.sh("sync")?;
        ensure!(disk::hash(&file)? == before, "the foreign disk was written to");
    }
    ensure!(names == ["/dev/nvme1n1", "/dev/nvme0n1"], "the kernel called the data disk {names:?}");
    Ok(())
}

pub(super) fn state_lost(stage: &mut Stage) -> Result<()> {
    let volume = host::volume();
    let file = stage.attach(&volume, host::DEVICE)?;
    host::provision(stage.guest()?, RUN)?;
    let guest = stage.guest()?;
    guest.sh("set -e; docker volume create records
              head -c 300000 /dev/urandom >/var/lib/docker/volumes/records/_data/r
              echo precious >/data/docker/volumes/records/_data/s; sync")?;
    let look = "cd /var/lib/docker/volumes/records/_data && sha256sum r s";
    let before = guest.sh(look)?;
    let made = guest.sh(CREATED)?;
    guest.sh("rm -r /var/lib/hostagent && sync")?;

    // The volume moves to a new instance, whose root disk comes from an image of this one.
    let id = "i-0fedcba9876543210";
    stage.cloud.reset()?;
    stage.cloud.instance(&Instance { id: id.to_owned(), ..Instance::default() })?;
    stage.cloud.volume(&volume)?;
    stage.cloud.attach_to_instance(id, &volume.id, host::DEVICE, true)?;
    stage.power_cycle_with(id, &[&volume])?;
    let guest = stage.guest()?;
    host::settled(guest, RUN)?;
    host::expect_ready(stage)?;
    let guest = stage.guest()?;
    let after = guest.sh(look)?;
    ensure!(before == after, "the data is not what it was:\n{before}{after}");
    let now = guest.sh(CREATED)?;
    ensure!(made == now, "the filesystem was made anew: {made}, {now}");
    guest.sh(&format!("grep -q {id} /var/lib/hostagent/volume.json"))?;
    ensure!(disk::contains(&file, b"precious")?, "the data is not on the volume");
    Ok(())
}

/// What tells one making of a filesystem from the next.
const CREATED: &str = "dumpe2fs -h $(findmnt -n -o SOURCE /data) 2>/dev/null | \
    grep -E '^Filesystem (UUID|created):'";
