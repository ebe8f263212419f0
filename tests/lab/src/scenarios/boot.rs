//! The lab itself: what every other scenario stands on.

use crate::cloud::Volume;
use crate::qemu::{INSTANCE_ID, ROOT_SERIAL};
use crate::stage::Stage;
use anyhow::{Result, ensure};
use std::time::Duration;

/// The data volume.
const VOLUME: &str = "vol-0123456789abcdef0";

pub(super) fn run(stage: &mut Stage) -> Result<()> {
    let guest = stage.guest()?;
    // What `cloud-init status` reads, without the seconds that Python takes to start.
    let cloud_init = guest.sh("cat /run/cloud-init/result.json")?;
    ensure!(cloud_init.contains("DataSourceEc2Local"), "cloud-init's result is {cloud_init:?}");
    let tag = guest.sh("cat /sys/class/dmi/id/board_asset_tag")?;
    ensure!(tag.trim() == INSTANCE_ID, "the board's asset tag is {tag:?}");
    let serial = guest.sh("cat /sys/block/vda/serial")?;
    ensure!(serial.trim() == ROOT_SERIAL, "the root disk's serial is {serial:?}");
    guest.sh("docker info >/dev/null")?;

    let id = guest.sh("token=$(curl -sSf -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' \
         http://169.254.169.254/latest/api/token) && \
         curl -sSf -H \"X-aws-ec2-metadata-token: $token\" \
         http://169.254.169.254/latest/meta-data/instance-id")?;
    ensure!(id.trim() == INSTANCE_ID, "the metadata service says the instance is {id:?}");
    let status = guest.sh(
        "curl -s -o /dev/null -w '%{http_code}' http://169.254.169.254/latest/meta-data/instance-id",
    )?;
    ensure!(status == "401", "without a token the metadata service answers {status}");

    let volume = Volume::new(VOLUME, true);
    stage.attach(&volume, "/dev/sdf")?;
    let guest = stage.guest()?;
    let look = "cat /sys/block/nvme0n1/device/serial";
    let serial = guest.until(look, Duration::from_secs(10))?;
    ensure!(serial.trim() == volume.serial(), "the NVMe disk's serial is {serial:?}");
    stage.vm()?.unplug(&volume.serial())?;
    stage.guest()?.until("! test -e /sys/block/nvme0n1", Duration::from_secs(10))?;
    Ok(())
}
