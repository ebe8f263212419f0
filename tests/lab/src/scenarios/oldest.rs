//! The oldest release: one host, on which as much as possible is shown of what differs there.

use super::{containers, host, ready, refused};
use crate::image::OLDEST_RELEASE;
use crate::qemu::INSTANCE_ID;
use crate::stage::Stage;
use anyhow::Result;
use std::time::Duration;

/// Long enough for a run in emulation.
const RUN: Duration = Duration::from_secs(300);

pub(super) fn ready(stage: &mut Stage) -> Result<()> {
    stage.guest()?.sh(&format!("grep -qx VERSION_CODENAME={OLDEST_RELEASE} /etc/os-release"))?;
    ready::becomes_ready(stage)?;
    // This Docker has no other way to keep layers: what turns the containerd image store on means
    // nothing to it.
    containers::kinds(stage.guest()?, "layers in /var/lib/docker (overlay2)")?;
    containers::hangs(stage)?;
    stage.guest()?.sh("docker rm -f good")?;
    refused::elsewhere(stage)?;

    stage.power_cycle_with(INSTANCE_ID, &[&host::volume()])?;
    host::settled(stage.guest()?, RUN)?;
    host::expect_ready(stage)
}
