//! What the daemons' units would have them do at their next start, of which the gate sees nothing.

use super::Facts;
use crate::control::{Context, Fact, Plan, Unknown, Verdict};
use crate::host::block::Volumes;
use crate::host::docker_config::next_start;
use crate::step::Step;

/// What an operator does about a daemon that is told to leave the volume.
const TO_THE_VOLUME: &str = "remove that from its unit, its drop-ins or the files in /etc/default that \
                             these read, or choose a directory below the mount point";

/// What the next start of a daemon would keep off the volume; none if nothing.
pub(in crate::controls) async fn off_volume(cx: &Context) -> Fact<Option<String>> {
    let result = match cx.host.systemd().await {
        Ok(systemd) => next_start::off_volume(systemd, cx.config.volume.mount_point.path()).await,
        Err(e) => Err(e),
    };
    Fact::new("docker.service, containerd.service", result)
}

/// The verdict on it.
pub(super) fn would_leave(volume: &Volumes, what: &str) -> Verdict {
    Verdict::fail(
        format!("Docker's and containerd's storage on {volume} after their next start too"),
        what,
        TO_THE_VOLUME,
    )
}

/// The plan in the place of any other that would start a daemon: started, it would write there. What
/// runs is stopped, if it is to be.
pub(super) fn refusal(facts: &Facts, stop: bool) -> Result<Option<Plan>, Unknown> {
    let Some(what) = facts.off_volume.known()? else { return Ok(None) };
    let steps = if stop { vec![Step::StopDocker] } else { vec![] };
    let why = format!("Docker is not started: {what}; {TO_THE_VOLUME}");
    Ok(Some(Plan::with_refusals(steps, &[why])))
}
