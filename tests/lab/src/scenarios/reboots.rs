//! What a reboot leaves: a ready host becomes ready again; a host without its volume keeps Docker
//! down and answers on its SSH port.

use super::host;
use crate::cloud::Fault;
use crate::stage::Stage;
use anyhow::{Context as _, Result, ensure};
use std::time::Duration;

/// Long enough for a run in emulation.
const RUN: Duration = Duration::from_secs(300);

/// What lies under the mounts on the root disk, seen through a second mount of it.
const BENEATH: &str = "mkdir -p /run/beneath && mount --bind / /run/beneath && \
    find /run/beneath/var/lib/docker /run/beneath/var/lib/containerd /run/beneath/data \
    -printf '%p %T@ %s\\n' | sort; umount /run/beneath";

pub(super) fn reboots(stage: &mut Stage) -> Result<()> {
    host::await_signals(stage)?;
    stage.attach(&host::volume(), host::DEVICE)?;
    host::provision(stage.guest()?, RUN)?;
    host::expect_ready(stage)?;
    let guest = stage.guest()?;
    guest.sh(
        "docker volume create kept && echo kept > /var/lib/docker/volumes/kept/_data/f && sync",
    )?;
    let beneath = guest.sh(BENEATH)?;

    // EC2 does not answer during the boot: Docker starts on the volume that was confirmed before.
    stage.cloud.fault(&Fault {
        service: "ec2".into(),
        kind: "error".into(),
        code: Some("ServiceUnavailable".into()),
        ..Fault::default()
    })?;
    stage.vm()?.reboot()?;
    let guest = stage.guest()?;
    guest
        .sh("! test -e /run/hostagent/ready || test /run/hostagent/ready -nt /proc/1")
        .context("readiness outlived the boot")?;
    guest
        .until("systemctl is-active docker.service containerd.service", Duration::from_secs(120))?;
    host::expect_storage(guest)?;
    guest.sh("! test -e /run/hostagent/ready").context("ready without EC2's word")?;
    stage.cloud.clear_faults()?;
    let guest = stage.guest()?;
    host::settled(guest, RUN)?;
    host::provision(guest, RUN)?;
    host::expect_ready(stage)?;
    // Said once, to a stack that is complete and a group that does not wait any more.
    host::expect_signals(stage, &["SUCCESS"], &["CONTINUE"])?;
    stage.guest()?.sh("grep -q kept /var/lib/docker/volumes/kept/_data/f")?;

    // The volume is gone: detached while the instance was stopped.
    stage.cloud.detach(host::VOLUME)?;
    host::configure(stage.guest()?, "wait", "[volume]\nwait_seconds = 5\n")?;
    stage.guest()?.sh("sync")?;
    stage.power_cycle()?;
    stage.vm()?.guest.wait(crate::vm::BOOT)?;
    let guest = stage.guest()?;
    guest.until(
        "! systemctl list-jobs --no-legend | grep -Eq 'docker|containerd'",
        Duration::from_secs(120),
    )?;
    host::settled(guest, RUN)?;
    host::expect_not_ready(stage, &[("data-volume", "fail"), ("docker-storage", "unknown")])?;
    let guest = stage.guest()?;
    host::expect_sshd(guest, 2222, 22)?;
    let now = guest.sh(BENEATH)?;
    ensure!(now == beneath, "something was written beneath the mounts:\n{beneath}\n{now}");
    guest.sh("! touch /data/file").context("something can be written under the mount point")?;
    Ok(())
}
