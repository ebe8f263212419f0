//! Disks that fail: that cannot be read or written, that say they have written and have not, that
//! something holds, or that answer no more.

use super::foreign::{blank, device, expect_refusal, expect_untouched, provision_disk, unplug};
use super::host;
use crate::disk;
use crate::guest::Script;
use crate::qemu::Fault;
use crate::stage::Stage;
use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use std::path::Path;
use std::time::Duration;

/// Long enough for a run in emulation.
const RUN: Duration = Duration::from_secs(300);

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

pub(super) fn faulty(stage: &mut Stage) -> Result<()> {
    let volume = host::volume();
    stage.announce(&volume, host::DEVICE)?;
    let file = blank(stage, &volume)?;
    stage.plug(&volume)?;
    let guest = stage.guest()?;
    let device = device(guest, &volume)?;
    host::configure(guest, "volume", "[volume]\nassembled = \"/dev/mapper/faulty\"\n")?;
    let sectors = u64::from(volume.size) << 21;
    let (half, mib) = (sectors / 2, 1 << 11);
    let rest = sectors - half - 16 * mib;
    let unreadable = [
        (
            "error",
            format!(
                "0 {half} linear {device} 0\n{half} {} error\n{} {rest} linear {device} {}",
                16 * mib,
                sectors - rest,
                sectors - rest
            ),
        ),
        ("flakey, and down", format!("0 {sectors} flakey {device} 0 0 3600")),
    ];
    let make =
        |table: &str| format!("printf '{table}\n' | dmsetup create faulty && udevadm settle");
    let remove = "dmsetup remove --retry faulty && udevadm settle";
    for (what, table) in unreadable {
        guest.sh(&make(&table))?;
        let (status, filesystem) = provision_disk(guest)?;
        ensure!(status == 2, "{what}: hostagent ended with {status}: {filesystem:#}");
        expect_refusal(&filesystem, "unknown", &["reading /dev/"]).context(what)?;
        expect_blank(&file).context(what)?;
        guest.sh(remove)?;
    }
    // It says that it has written, and has not, or not that: what is read back is not what was meant.
    for (what, feature) in [("drops", "1 drop_writes"), ("garbles", "5 corrupt_bio_byte 32 w 1 0")]
    {
        guest.sh(&make(&format!("0 {sectors} flakey {device} 0 0 3600 {feature}")))?;
        let (status, filesystem) = provision_disk(guest)?;
        ensure!(status != 0, "{what}: hostagent ended with {status}: {filesystem:#}");
        ensure!(filesystem["verdict"]["status"] != "pass", "{what}: {filesystem:#}");
        let steps = filesystem["steps"].to_string();
        ensure!(steps.contains("reads back differently"), "{what}: {filesystem:#}");
        guest.sh(remove)?;
        if what == "drops" {
            expect_blank(&file)?;
        }
    }
    // What the disk has made of it is recognised by nothing, and is not taken for an unfinished
    // format.
    guest.sh(&make(&format!("0 {sectors} linear {device} 0")))?;
    let (status, filesystem) = provision_disk(guest)?;
    ensure!(status == 1, "hostagent ended with {status}: {filesystem:#}");
    expect_refusal(&filesystem, "fail", &["format_unrecognised"])
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
    guest.until("hostagent status; test $? = 1", RUN)?;
    let status = host::hostagent(guest, "status")?;
    ensure!(status.stdout.contains("data-filesystem"), "{status:?}");
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
