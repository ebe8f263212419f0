//! Which device is the data volume: how it is chosen, and what it may stand on.

use super::host;
use crate::cloud::Volume;
use crate::disk;
use crate::guest::Guest;
use crate::stage::Stage;
use anyhow::{Context as _, Result, ensure};
use std::path::PathBuf;
use std::time::Duration;

/// Long enough for a run in emulation.
const RUN: Duration = Duration::from_secs(300);

/// A second volume beside [`host::VOLUME`].
const SECOND: &str = "vol-0bbbbbbbbbbbbbbb2";

/// The tag that chooses volumes, and what it is called in the configuration.
const TAG: (&str, &str) = ("Use", "patient-data");

/// Attaches a volume that carries the tag.
fn tagged(stage: &mut Stage, id: &str, device: &str, encrypted: bool) -> Result<PathBuf> {
    let mut volume = Volume::new(id, encrypted);
    volume.tags.insert(TAG.0.to_owned(), TAG.1.to_owned());
    stage.attach(&volume, device)
}

/// Makes one logical volume over the first two NVMe disks, and names it in the configuration.
fn assemble(guest: &mut Guest) -> Result<()> {
    guest.until("test -b /dev/nvme0n1 && test -b /dev/nvme1n1", Duration::from_secs(10))?;
    guest.sh(
        "pvcreate -q /dev/nvme0n1 /dev/nvme1n1 && vgcreate -q patients /dev/nvme0n1 /dev/nvme1n1 \
              && lvcreate -q -i 2 -l 100%FREE -n data patients",
    )?;
    let text = format!(
        "[volume]\ntag = \"{}={}\"\nassembled = \"/dev/mapper/patients-data\"\n",
        TAG.0, TAG.1
    );
    host::configure(guest, "volume", &text)
}

pub(super) fn assembled(stage: &mut Stage) -> Result<()> {
    host::await_signals(stage)?;
    tagged(stage, host::VOLUME, "/dev/sdf", true)?;
    tagged(stage, SECOND, "/dev/sdg", true)?;
    assemble(stage.guest()?)?;
    host::provision(stage.guest()?, RUN)?;
    host::expect_signals(stage, &["SUCCESS"], &["CONTINUE"])?;
    let guest = stage.guest()?;
    let (status, report) = host::verify(guest)?;
    ensure!(status == 0, "verify ended with {status}: {report:#}");
    let source = guest.sh("findmnt -n -o SOURCE /data")?;
    ensure!(source.trim() == "/dev/mapper/patients-data", "/data is on {source}");
    let told = host::hostagent(guest, "explain data-volume")?;
    for part in ["device mapper (LVM)", host::VOLUME, SECOND, "Verdict: pass"] {
        ensure!(told.stdout.contains(part), "{part:?} is not in {}", told.stdout);
    }
    // A disk that nobody chose comes beneath: it is not the same device any more.
    stage.attach(&Volume::new("vol-0ccccccccccccccc3", true), "/dev/sdh")?;
    let guest = stage.guest()?;
    guest.until("test -b /dev/nvme2n1", Duration::from_secs(10))?;
    guest.sh("vgextend -q patients /dev/nvme2n1 && lvextend -q -i 1 -l +50 patients/data")?;
    let (status, report) = host::verify(guest)?;
    ensure!(status == 1 && host::word(&report, "data-volume") == "fail", "{report:#}");
    let gate = host::hostagent(guest, "gate")?;
    ensure!(gate.status == 1, "the gate is open: {gate:?}");
    Ok(())
}

pub(super) fn weakest(stage: &mut Stage) -> Result<()> {
    host::await_signals(stage)?;
    let first = tagged(stage, host::VOLUME, "/dev/sdf", true)?;
    let second = tagged(stage, SECOND, "/dev/sdg", false)?;
    let guest = stage.guest()?;
    assemble(guest)?;
    guest.sh("sync")?;
    let before = (disk::hash(&first)?, disk::hash(&second)?);
    host::provision(guest, RUN)?;
    let verdicts = [("data-volume", "fail"), ("data-filesystem", "unknown")];
    host::expect_not_ready(stage, &verdicts)?;
    stage.guest()?.sh("sync")?;
    ensure!((disk::hash(&first)?, disk::hash(&second)?) == before, "a disk was written to");
    // Without the word that something stands on the volume, what holds its disk is somebody's.
    stage.guest()?.sh("rm /etc/hostagent/conf.d/volume.toml")?;
    host::provision(stage.guest()?, RUN)?;
    host::expect_not_ready(stage, &[("data-filesystem", "fail")])?;
    stage.guest()?.sh("sync")?;
    ensure!((disk::hash(&first)?, disk::hash(&second)?) == before, "a disk was written to");
    Ok(())
}

/// Expects `explain data-volume` to lead from the mount point to the key.
pub(super) fn expect_chain(guest: &mut Guest) -> Result<()> {
    let told = host::hostagent(guest, "explain data-volume")?;
    ensure!(told.status == 0, "{told:?}");
    let chain = told.stdout.split_once("  chain (").context("no chain is told")?.1;
    let links = [
        "/data: ext4 on the device",
        "disk, serial number vol0123456789abcdef0: vol-0123456789abcdef0",
        "vol-0123456789abcdef0: attached as /dev/sdf, encrypted with arn:aws:kms:",
    ];
    for link in links {
        ensure!(chain.contains(link), "{link:?} is not in {}", told.stdout);
    }
    Ok(())
}
