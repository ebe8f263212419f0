//! The data volume's disk is not what it should be: it carries what somebody else put there, it
//! fails, it answers no more, it comes under another name, or the host has forgotten that it is its
//! own. A disk that is not proven blank keeps every byte, which is looked at from outside.

use super::host;
use crate::cloud::{Instance, Volume};
use crate::disk;
use crate::guest::{Guest, Script};
use crate::qemu::{Fault, INSTANCE_ID};
use crate::stage::Stage;
use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
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
fn provision_disk(guest: &mut Guest) -> Result<(i64, Value)> {
    let ended = host::hostagent(guest, "provision --only data-mount --format json")?;
    let report: Value = serde_json::from_str(&ended.stdout)
        .with_context(|| format!("reading the report\n{}{}", ended.stdout, ended.stderr))?;
    ensure!(report["ready"] != true, "a part of the controls made the host ready: {report:#}");
    let controls = report["controls"].as_array().map(Vec::as_slice).unwrap_or_default();
    let found = controls.iter().find(|control| control["id"] == "data-filesystem");
    Ok((ended.status, found.context("no verdict on data-filesystem")?.clone()))
}

/// Expects a verdict on `data-filesystem` after which nothing was done, and a word in what it says.
fn expect_refusal(filesystem: &Value, verdict: &str, named: &[&str]) -> Result<()> {
    let said = filesystem["verdict"].to_string() + &filesystem["refusal"].to_string();
    ensure!(filesystem["verdict"]["status"] == verdict, "not {verdict}: {filesystem:#}");
    ensure!(named.iter().any(|n| said.contains(n)), "{named:?} is not named: {filesystem:#}");
    ensure!(filesystem.get("steps").is_none(), "something was done: {filesystem:#}");
    Ok(())
}

/// Expects that nothing of a disk is mounted, nor anything on the mount point, and no readiness.
fn expect_untouched(guest: &mut Guest, device: &str) -> Result<()> {
    guest.sh(&format!("sync; ! findmnt -n /data && ! findmnt -n {device}")).context("mounted")?;
    guest.sh("! test -e /run/hostagent/ready").context("the host is ready").map(drop)
}

/// The kernel's name of a volume's disk, once udev has looked at it.
fn device(guest: &mut Guest, volume: &Volume) -> Result<String> {
    let link = format!("readlink -e /dev/disk/by-id/nvme-*_{}", volume.serial());
    Ok(guest.until(&link, Duration::from_secs(20))?.trim().to_owned())
}

/// Makes the file of an unplugged volume blank.
fn blank(stage: &Stage, volume: &Volume) -> Result<std::path::PathBuf> {
    let file = stage.disk_of(volume).file;
    disk::create(&file, volume.size)?;
    Ok(file)
}

/// Detaches a volume's disk; what the host made of it by itself (volume groups, arrays) goes first.
fn unplug(stage: &mut Stage, volume: &Volume) -> Result<()> {
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

pub(super) fn errors(stage: &mut Stage) -> Result<()> {
    let volume = host::volume();
    stage.announce(&volume, host::DEVICE)?;
    let size = u64::from(volume.size) << 30;
    // Blank, as far as can be read: at the beginning, among the samples, in the tail.
    for (what, sector) in [
        ("no read works", None),
        ("one sector of the samples", Some((700 << 20) / 512)),
        ("one sector of the tail", Some(size / 512 - 9)),
    ] {
        let file = blank(stage, &volume)?;
        stage.plug_with(&volume, Fault::Read(sector))?;
        let guest = stage.guest()?;
        let device = device(guest, &volume)?;
        let (status, filesystem) = provision_disk(guest)?;
        ensure!(status == 2, "{what}: hostagent ended with {status}: {filesystem:#}");
        expect_refusal(&filesystem, "unknown", &["at byte", "reading /dev/"]).context(what)?;
        expect_untouched(guest, &device)?;
        expect_blank(&file).context(what)?;
        unplug(stage, &volume)?;
    }
    // It can be read, and not be written: the filesystem does not come into being.
    let blank_hash = disk::hash(&blank(stage, &volume)?)?;
    for (what, fault) in [("no write works", Fault::Write), ("no flush works", Fault::Flush)] {
        let file = blank(stage, &volume)?;
        stage.plug_with(&volume, fault)?;
        let guest = stage.guest()?;
        let device = device(guest, &volume)?;
        let (status, filesystem) = provision_disk(guest)?;
        ensure!(status != 0, "{what}: hostagent ended with {status}: {filesystem:#}");
        ensure!(filesystem["verdict"]["status"] != "pass", "{what}: {filesystem:#}");
        let steps = filesystem["steps"].to_string();
        ensure!(steps.contains("failed"), "{what}: no step failed: {filesystem:#}");
        expect_untouched(guest, &device).context(what)?;
        if fault == Fault::Write {
            // Zeros may have been written: QEMU has another name for such a write.
            ensure!(disk::hash(&file)? == blank_hash, "{what}: the disk holds something");
        }
        unplug(stage, &volume)?;
    }
    Ok(())
}

pub(super) fn mapped(stage: &mut Stage) -> Result<()> {
    let volume = host::volume();
    stage.announce(&volume, host::DEVICE)?;
    let file = blank(stage, &volume)?;
    stage.plug(&volume)?;
    let guest = stage.guest()?;
    let device = device(guest, &volume)?;
    let sectors = u64::from(volume.size) << 21;
    let half = sectors / 2;
    // Blank, and used by somebody, of whom only the kernel knows.
    for (what, table) in [
        ("linear", format!("0 {sectors} linear {device} 0")),
        ("flakey", format!("0 {sectors} flakey {device} 0 1 1")),
        ("error", format!("0 {half} linear {device} 0\n{half} {half} error")),
    ] {
        guest.sh(&format!("printf '{table}\\n' | dmsetup create mapped && udevadm settle"))?;
        let (status, filesystem) = provision_disk(guest)?;
        ensure!(status == 1, "{what}: hostagent ended with {status}: {filesystem:#}");
        expect_refusal(&filesystem, "fail", &["held by dm-"]).context(what)?;
        expect_untouched(guest, &device)?;
        expect_blank(&file).context(what)?;
        guest.sh("dmsetup remove --retry mapped && udevadm settle")?;
    }
    // Nobody uses it any more.
    let (status, filesystem) = provision_disk(guest)?;
    ensure!(status == 0, "hostagent ended with {status}: {filesystem:#}");
    Ok(())
}

pub(super) fn hangs(stage: &mut Stage) -> Result<()> {
    host::await_signals(stage)?;
    let volume = host::volume();
    stage.announce(&volume, host::DEVICE)?;
    // As Amazon's images have it: the kernel waits for a disk as long as it takes.
    stage.guest()?.sh("echo 4294967295 >/sys/module/nvme_core/parameters/io_timeout")?;
    let file = stage.plug_with(&volume, Fault::Hangs)?;
    let guest = stage.guest()?;
    device(guest, &volume)?;
    guest.sh("udevadm settle; echo 3 >/proc/sys/vm/drop_caches")?;
    let disk = stage.disk_of(&volume);
    stage.vm()?.hang(&disk)?;
    let guest = stage.guest()?;
    // No process ends of which the kernel holds a thread, so it is the report that is waited for.
    let script = "setsid hostagent verify --only data-filesystem --format json >/run/report 2>&1 &";
    guest.run(&Script::new(script).env("AWS_ENDPOINT_URL", "http://169.254.169.5"))?;
    let waited = guest.until("tail -n 1 /run/report | grep -qx }", Duration::from_secs(100));
    if let Err(error) = waited {
        let look = "cat /run/report; cd /proc; for t in [0-9]*/task/*; do \
                    case $(cat $t/comm) in hostagent|tokio*|blkid) \
                    echo $t $(cat $t/comm) $(grep State $t/status); cat $t/stack; esac; done";
        bail!("{error:#}: {}", guest.sh(look)?);
    }
    let report: Value = serde_json::from_str(&guest.sh("cat /run/report")?)?;
    let verdict = host::word(&report, "data-filesystem");
    ensure!(verdict == "unknown", "data-filesystem is {verdict}: {report:#}");
    // A run says and signals what it came to, though its process cannot end.
    let guest = stage.guest()?;
    guest.sh("systemctl start --no-block hostagent.service")?;
    guest.until("hostagent status | grep -q '^not ready'", RUN)?;
    let status = host::hostagent(guest, "status")?;
    ensure!(status.status == 1 && status.stdout.contains("data-filesystem"), "{status:?}");
    guest.sh("! pgrep -x dockerd && ! test -e /run/hostagent/ready")?;
    host::expect_signals(stage, &["FAILURE"], &["ABANDON"])?;
    expect_blank(&file)
}

/// Expects that nothing was ever written to a disk's file.
fn expect_blank(file: &Path) -> Result<()> {
    let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(file)?);
    ensure!(blocks == 0, "{} was written to", file.display());
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
