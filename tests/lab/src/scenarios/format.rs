//! How the data volume gets its filesystem: a format that is interrupted, content that nothing
//! recognises, XFS, and growth.

use super::host;
use crate::cloud::Volume;
use crate::disk;
use crate::guest::Script;
use crate::stage::Stage;
use anyhow::{Context as _, Result, ensure};
use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Long enough for a run in emulation.
const RUN: Duration = Duration::from_secs(300);

/// Takes the volume out of use.
const UNMOUNT: &str = "systemctl stop docker.socket docker.service containerd.service \
    var-lib-docker.mount var-lib-containerd.mount data.mount";

/// What one control's verdict and refusal say.
fn said(stage: &mut Stage, control: &str) -> Result<String> {
    let plan = host::hostagent(stage.guest()?, "plan --format json")?;
    let report: serde_json::Value =
        serde_json::from_str(&plan.stdout).with_context(|| format!("reading {plan:?}"))?;
    let controls = report["controls"].as_array().map(Vec::as_slice).unwrap_or_default();
    let found = controls.iter().find(|c| c["id"] == control).context("no such control")?;
    Ok(format!("{} {} {}", found["verdict"], found["refusal"], found["steps"]))
}

/// Provisions, and expects a refusal because of what is on the disk, which stays as it is.
fn refuses(stage: &mut Stage, path: &Path) -> Result<()> {
    stage.guest()?.sh("sync")?;
    let before = disk::hash(path)?;
    host::provision(stage.guest()?, RUN)?;
    host::expect_not_ready(stage, &[("data-filesystem", "fail"), ("data-mount", "unknown")])?;
    stage.guest()?.sh("sync")?;
    ensure!(disk::hash(path)? == before, "the disk was written to");
    Ok(())
}

fn set_byte(path: &Path, at: u64, byte: u8) -> Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    file.write_all_at(&[byte], at).with_context(|| format!("writing to {}", path.display()))
}

/// How many bytes of a disk were ever written to.
fn allocated(path: &Path) -> Result<u64> {
    Ok(std::fs::metadata(path)?.blocks() * 512)
}

/// Runs hostagent, and kills it when it has written this much to the disk.
fn killed_at(stage: &mut Stage, path: &Path, bytes: u64) -> Result<()> {
    stage.guest()?.sh("systemctl reset-failed hostagent.service 2>/dev/null; \
                       systemctl start --no-block hostagent.service")?;
    let end = Instant::now() + RUN;
    while allocated(path)? < bytes {
        ensure!(Instant::now() < end, "nothing is written to the disk");
        std::thread::sleep(Duration::from_millis(10));
    }
    let guest = stage.guest()?;
    guest.sh("systemctl kill -s KILL hostagent.service")?;
    guest.until("! pgrep -x hostagent && ! pgrep -x mkfs.ext4", Duration::from_secs(60))?;
    // Nothing recognises what is there.
    guest.sh("! blkid -p /dev/nvme0n1").context("a filesystem is there already")?;
    Ok(())
}

pub(super) fn interrupted(stage: &mut Stage) -> Result<()> {
    // So large that its filesystem takes four megabytes, which then take ten seconds.
    let volume = Volume { size: 8, ..host::volume() };
    let path = stage.attach(&volume, host::DEVICE)?;
    stage.guest()?.until("test -b /dev/nvme0n1", Duration::from_secs(10))?;
    stage.vm()?.throttle_writes(&volume.serial(), 400_000)?;
    for megabytes in [0, 2, 3] {
        killed_at(stage, &path, (megabytes << 20) + 1)?;
        let said = said(stage, "data-filesystem")?;
        ensure!(said.contains("finish formatting vol-0123456789abcdef0"), "{said}");
    }
    stage.vm()?.throttle_writes(&volume.serial(), 0)?;

    // One byte of somebody else's, where the image is zero.
    set_byte(&path, (7 << 20) + 3, 1)?;
    refuses(stage, &path)?;
    let why = said(stage, "data-filesystem")?;
    ensure!(why.contains("nothing recognises, at byte "), "{why}");
    set_byte(&path, (7 << 20) + 3, 0)?;

    // Without the intent, or with a damaged one, it is nobody's.
    let format = "/var/lib/hostagent/format";
    let guest = stage.guest()?;
    guest.sh(&format!(
        "cp {format}/*.json /run/intent && echo '{{' > {format}/{}.json",
        volume.id
    ))?;
    let why = said(stage, "data-filesystem")?;
    ensure!(why.contains("is not known") && why.contains(".json"), "{why}");
    stage.guest()?.sh(&format!("cp /run/intent {format}/{}.json", volume.id))?;

    host::provision(stage.guest()?, RUN)?;
    host::expect_ready(stage)?;
    let guest = stage.guest()?;
    guest.sh("journalctl -b -u hostagent.service -o cat | grep -q 'finish formatting'")?;
    guest.sh(&format!("test -z \"$(ls {format})\"")).context("something is left of the format")?;
    // What was pieced together is whole.
    guest.sh(UNMOUNT)?;
    guest.sh("e2fsck -fn /dev/nvme0n1")?;
    Ok(())
}

/// Writes bytes without meaning to a disk that does not exist yet, before it is attached.
fn noise(stage: &Stage, volume: &Volume) -> Result<PathBuf> {
    let path = stage.dir().join(format!("{}.raw", volume.id));
    disk::create(&path, volume.size)?;
    let file = OpenOptions::new().write(true).open(&path)?;
    let mut word = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = vec![0; 1 << 20];
    // The beginning, the middle of what the filesystem will write, its journal, the end.
    for megabyte in [0, 1, 128, 1024, 4097, 8191] {
        for place in bytes.chunks_exact_mut(8) {
            word ^= word << 13;
            word ^= word >> 7;
            word ^= word << 17;
            place.copy_from_slice(&word.to_le_bytes());
        }
        file.write_all_at(&bytes, megabyte << 20)?;
    }
    Ok(path)
}

pub(super) fn named_unrecognised(stage: &mut Stage) -> Result<()> {
    let volume = Volume { size: 8, ..host::volume() };
    let path = noise(stage, &volume)?;
    stage.attach(&volume, host::DEVICE)?;
    refuses(stage, &path)?;
    let why = said(stage, "data-filesystem")?;
    let wanted = format!("volume.format_unrecognised = [\\\"{}\\\"]", volume.id);
    ensure!(why.contains(&wanted), "{wanted} is not in {why}");

    // Another volume's id allows nothing.
    let other = "[volume]\nformat_unrecognised = [\"vol-0fffffffffffffff0\"]\n";
    host::configure(stage.guest()?, "format", other)?;
    let why = said(stage, "data-filesystem")?;
    ensure!(why.contains(&wanted), "{wanted} is not in {why}");

    let named = format!("[volume]\nformat_unrecognised = [\"{}\"]\n", volume.id);
    host::configure(stage.guest()?, "format", &named)?;
    host::provision(stage.guest()?, RUN)?;
    host::expect_ready(stage)?;
    // It stays what it is, although the volume is still named, and also when its superblock is lost.
    let plan = host::hostagent(stage.guest()?, "plan")?;
    ensure!(plan.stdout.ends_with("; 0 steps to do\n"), "{plan:?}");
    let guest = stage.guest()?;
    guest.sh(UNMOUNT)?;
    guest.sh("dd if=/dev/zero of=/dev/nvme0n1 bs=64k count=1 oflag=direct status=none")?;
    guest.sh("! blkid -p /dev/nvme0n1").context("blkid still sees something")?;
    let why = said(stage, "data-filesystem")?;
    ensure!(why.contains("it held hostagent's own filesystem"), "{why}");
    Ok(())
}

pub(super) fn hidden_signature(stage: &mut Stage) -> Result<()> {
    let volume = host::volume();
    let path = stage.attach(&volume, host::DEVICE)?;
    let guest = stage.guest()?;
    guest.until("test -b /dev/nvme0n1", Duration::from_secs(10))?;
    // Somebody's ext4 whose superblock was damaged: blkid checks its checksum, and finds nothing.
    guest.sh("mkfs.ext4 -q /dev/nvme0n1 && sync")?;
    set_byte(&path, 1024 + 0x78, b'X')?;
    guest
        .sh("echo 3 >/proc/sys/vm/drop_caches; ! blkid -p /dev/nvme0n1")
        .context("blkid still sees something")?;
    let named = format!("[volume]\nformat_unrecognised = [\"{}\"]\n", volume.id);
    host::configure(guest, "format", &named)?;
    refuses(stage, &path)?;
    let why = said(stage, "data-filesystem")?;
    ensure!(why.contains("blkid finds nothing, but hostagent's own probe ext4"), "{why}");
    Ok(())
}

/// Attaches the volume as a disk that can grow.
fn attach_growing(stage: &mut Stage) -> Result<Volume> {
    let volume = host::volume();
    stage.cloud.volume(&volume)?;
    stage.cloud.attach(&volume.id, host::DEVICE, true)?;
    let path = stage.dir().join(format!("{}.raw", volume.id));
    disk::create(&path, volume.size)?;
    stage.vm()?.plug_virtio(&path, &volume.serial())?;
    Ok(volume)
}

/// Enlarges the volume of a ready host by a gibibyte, first without and then with `volume.grow`.
fn grows(stage: &mut Stage, volume: &Volume) -> Result<()> {
    let larger = volume.size + 1;
    stage.vm()?.resize(&volume.serial(), larger)?;
    let guest = stage.guest()?;
    let seen = format!("test $(cat /sys/block/vdb/size) = {}", u64::from(larger) << 21);
    guest.until(&seen, Duration::from_secs(20)).context("the guest does not see it grow")?;
    let size = "df --output=size -B1M /data | tail -n 1";
    let before: u64 = guest.sh(size)?.trim().parse()?;
    let (status, report) = host::verify(guest)?;
    ensure!(status == 0 && host::word(&report, "data-size") == "not-applicable", "{report:#}");

    host::configure(guest, "grow", "[volume]\ngrow = true\n")?;
    let (status, report) = host::verify(guest)?;
    ensure!(status == 1 && host::word(&report, "data-size") == "fail", "{report:#}");
    let invocation = "systemctl show -P InvocationID docker.service data.mount";
    let running = guest.sh(invocation)?;
    host::provision(guest, RUN)?;
    host::expect_ready(stage)?;
    let guest = stage.guest()?;
    let after: u64 = guest.sh(size)?.trim().parse()?;
    ensure!(after > before + 900, "/data had {before} MiB and has {after}");
    ensure!(guest.sh(invocation)? == running, "Docker or the mount was restarted");
    Ok(())
}

pub(super) fn growth(stage: &mut Stage) -> Result<()> {
    let volume = attach_growing(stage)?;
    host::provision(stage.guest()?, RUN)?;
    host::expect_ready(stage)?;
    grows(stage, &volume)
}

pub(super) fn xfs(stage: &mut Stage) -> Result<()> {
    let volume = attach_growing(stage)?;
    let guest = stage.guest()?;
    host::configure(guest, "xfs", "[volume]\nfilesystem = \"xfs\"\n")?;
    // Without the program nothing is begun.
    guest.sh("mv /usr/sbin/mkfs.xfs /usr/sbin/mkfs.xfs.away")?;
    host::provision(guest, RUN)?;
    let why = said(stage, "data-filesystem")?;
    ensure!(why.contains("apt-get install xfsprogs"), "{why}");
    let guest = stage.guest()?;
    guest.sh("! blkid -p /dev/vdb && ! test -e /var/lib/hostagent/format")?;
    guest.sh("mv /usr/sbin/mkfs.xfs.away /usr/sbin/mkfs.xfs")?;

    host::provision(guest, RUN)?;
    host::expect_ready(stage)?;
    let guest = stage.guest()?;
    guest.sh("test $(findmnt -n -o FSTYPE /data) = xfs && xfs_info /data | grep -q ftype=1")?;
    guest.sh("mkdir -p /run/busybox/bin && cp /bin/busybox /run/busybox/bin/ && \
         tar -C /run/busybox -c . | docker import - busybox:local")?;
    let run = "docker run --rm --network none busybox:local /bin/busybox sh -c \
               'echo works > /file && /bin/busybox cat /file'";
    let out = guest.succeed(&Script::new(run).deadline(Duration::from_secs(120)))?;
    ensure!(out.trim() == "works", "the container said {out:?}");
    grows(stage, &volume)?;
    let plan = host::hostagent(stage.guest()?, "plan")?;
    ensure!(plan.stdout.ends_with("; 0 steps to do\n"), "{plan:?}");
    Ok(())
}
