//! What scenarios do with the host under test, and what they expect of it.

use crate::cloud::Volume;
use crate::guest::{Ended, Guest, Script};
use crate::qemu::INSTANCE_ID;
use crate::stage::Stage;
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use std::time::Duration;

/// The data volume.
pub(super) const VOLUME: &str = "vol-0123456789abcdef0";

/// The device name that it has in EC2.
pub(super) const DEVICE: &str = "/dev/sdf";

/// The stack, its resource, the group and its hook that wait for the host.
pub(super) const STACK: &str = "patients";
pub(super) const RESOURCE: &str = "Host";
pub(super) const GROUP: &str = "workers";
pub(super) const HOOK: &str = "launch";

/// All controls, in the order of the report.
pub(super) const CONTROLS: [&str; 14] = [
    "instance-tenancy",
    "sshd-port",
    "sshd-hardening",
    "boot-order",
    "swap",
    "core-dumps",
    "data-volume",
    "root-volume",
    "data-filesystem",
    "data-mount",
    "data-size",
    "docker-storage",
    "docker-daemon",
    "container-storage",
];

/// The data volume as it should be.
pub(super) fn volume() -> Volume {
    let mut volume = Volume::new(VOLUME, true);
    volume.kms_key_id = Some("arn:aws:kms:us-east-1:111122223333:key/1".to_owned());
    volume
}

/// Makes a stack and a group that wait, and tells the host about them by its configuration.
pub(super) fn await_signals(stage: &mut Stage) -> Result<()> {
    stage.cloud.stack(STACK, &[RESOURCE], 1)?;
    stage.cloud.group(GROUP, "Pending:Wait", HOOK)?;
    let text = format!(
        "[signal]\nstack = \"{STACK}\"\nresource = \"{RESOURCE}\"\ngroup = \"{GROUP}\"\nhook = \"{HOOK}\"\n"
    );
    configure(stage.guest()?, "signal", &text)
}

/// Writes a file of the configuration.
pub(super) fn configure(guest: &mut Guest, name: &str, text: &str) -> Result<()> {
    guest.sh("mkdir -p /etc/hostagent/conf.d")?;
    let path = format!("/etc/hostagent/conf.d/{name}.toml");
    guest.write(&path, text.as_bytes())?;
    guest.sh(&format!("chmod 0644 {path}")).map(drop)
}

/// Runs a command of hostagent's, pointed at the simulated cloud.
pub(super) fn hostagent(guest: &mut Guest, arguments: &str) -> Result<Ended> {
    let text = format!("hostagent {arguments}");
    let script = Script::new(&text).env("AWS_ENDPOINT_URL", "http://169.254.169.5");
    guest.run(&script.deadline(Duration::from_secs(120)))
}

/// Starts the service as user-data does, and waits for the end of its run.
pub(super) fn provision(guest: &mut Guest, deadline: Duration) -> Result<()> {
    guest.sh("systemctl start --no-block hostagent.service")?;
    settled(guest, deadline)
}

/// Waits until the service has ended its run.
pub(super) fn settled(guest: &mut Guest, deadline: Duration) -> Result<()> {
    let ended = "case $(systemctl show -P ActiveState hostagent.service) in inactive|failed) \
                 test -n \"$(systemctl show -P ExecMainExitTimestamp hostagent.service)\";; *) false;; esac";
    guest.until(ended, deadline).map(drop)
}

/// The report of `hostagent verify`, with its exit status.
pub(super) fn verify(guest: &mut Guest) -> Result<(i64, Value)> {
    let ended = hostagent(guest, "verify --format json")?;
    let report = serde_json::from_str(&ended.stdout)
        .with_context(|| format!("reading the report\n{}{}", ended.stdout, ended.stderr))?;
    Ok((ended.status, report))
}

/// The word of a control's verdict in a report.
pub(super) fn word<'a>(report: &'a Value, control: &str) -> &'a str {
    let controls = report["controls"].as_array().map(Vec::as_slice).unwrap_or_default();
    let found = controls.iter().find(|c| c["id"] == control);
    found.and_then(|c| c["verdict"]["status"].as_str()).unwrap_or("absent")
}

/// Expects a host that is ready in every respect, and that said so once to each who waited.
pub(super) fn expect_ready(stage: &mut Stage) -> Result<()> {
    let guest = stage.guest()?;
    guest.sh("test -s /run/hostagent/ready").context("the marker is missing")?;
    guest.sh("systemctl is-active hostagent-ready.target docker.service containerd.service")?;
    let (status, report) = verify(guest)?;
    ensure!(status == 0, "verify ended with {status}: {report:#}");
    for control in CONTROLS {
        ensure!(word(&report, control) == "pass", "{control}: {report:#}");
    }
    ensure!(
        report["controls"].as_array().map(Vec::len) == Some(CONTROLS.len()),
        "the report has not one entry for each control"
    );
    let status = hostagent(guest, "status")?;
    ensure!(status.status == 0 && status.stdout.starts_with("ready since"), "{status:?}");
    hostagent(guest, "gate").and_then(|gate| {
        ensure!(gate.status == 0, "the gate is closed: {gate:?}");
        Ok(())
    })?;
    expect_storage(guest)?;
    expect_sshd(guest, 2222, 22)
}

/// Expects Docker's storage on the volume, looked at without hostagent.
pub(super) fn expect_storage(guest: &mut Guest) -> Result<()> {
    let serial = VOLUME.replacen('-', "", 1);
    let device = guest.sh("findmnt -n -o SOURCE --target /data")?;
    let device = device.trim().trim_start_matches("/dev/").to_owned();
    // NVMe has it below `device`, virtio beside it.
    let seen = guest
        .sh(&format!("cd /sys/block/{device} && cat $(ls device/serial serial 2>/dev/null)"))?;
    ensure!(seen.trim() == serial, "/data is on the disk {seen:?}");
    let numbers =
        guest.sh("stat -c %d /data /var/lib/docker /var/lib/containerd | sort -u | wc -l")?;
    ensure!(numbers.trim() == "1", "Docker's storage is not on the device of /data");
    let root = guest.sh("stat -c %d / /data | sort -u | wc -l")?;
    ensure!(root.trim() == "2", "/data is on the root disk");
    Ok(())
}

/// Expects sshd to answer on one port in both families, and nothing on the other.
pub(super) fn expect_sshd(guest: &mut Guest, port: u16, silent: u16) -> Result<()> {
    for address in ["127.0.0.1", "::1"] {
        let banner = format!("timeout 20 bash -c 'read -r l </dev/tcp/{address}/{port}; echo $l'");
        let banner = guest.sh(&banner)?;
        ensure!(banner.starts_with("SSH-2.0-"), "{address}:{port} says {banner:?}");
        let closed = format!("! timeout 5 bash -c ': </dev/tcp/{address}/{silent}' 2>/dev/null");
        guest.sh(&closed).with_context(|| format!("{address}:{silent} answers"))?;
    }
    Ok(())
}

/// Expects a host that is not ready in any form, whose Docker is down, whose sshd answers, and that
/// told everybody who waited; with a verdict for some controls.
pub(super) fn expect_not_ready(stage: &mut Stage, verdicts: &[(&str, &str)]) -> Result<()> {
    let guest = stage.guest()?;
    guest.sh("! test -e /run/hostagent/ready").context("the marker is there")?;
    guest.sh("! systemctl is-active --quiet hostagent-ready.target").context("the target is up")?;
    guest.sh("! systemctl is-active --quiet docker.service").context("Docker runs")?;
    guest.sh("! pgrep -x dockerd && ! pgrep -x containerd").context("Docker runs")?;
    guest.sh("ss -ltn | grep -Eq ':(22|2222) '").context("sshd does not answer")?;
    let (status, report) = verify(guest)?;
    ensure!(status == 1 || status == 2, "verify ended with {status}: {report:#}");
    for (control, expected) in verdicts {
        let seen = word(&report, control);
        ensure!(seen == *expected, "{control} is {seen}, not {expected}: {report:#}");
    }
    let status = hostagent(guest, "status")?;
    ensure!(status.status == 1 && status.stdout.starts_with("not ready"), "{status:?}");
    // The reason is in the journal, with its fields.
    let journal = guest
        .sh("journalctl -b -u hostagent.service -o cat HOSTAGENT_READY=false || \
         journalctl -b -o cat HOSTAGENT_READY=false")?;
    for (control, verdict) in verdicts {
        let fields = format!("HOSTAGENT_CONTROL={control} HOSTAGENT_VERDICT={verdict}");
        guest.sh(&format!("journalctl -b -o cat {fields} | grep -q ."))?;
        ensure!(journal.contains(control), "the journal does not name {control}: {journal}");
    }
    Ok(())
}

/// Expects the signals that were sent to the stack and to the group.
pub(super) fn expect_signals(stage: &Stage, stack: &[&str], group: &[&str]) -> Result<()> {
    let seen = stage.cloud.stack_state(STACK)?;
    let said: Vec<&str> = seen.signals.iter().map(|s| s.status.as_str()).collect();
    ensure!(said == stack, "the stack was told {said:?}, not {stack:?}");
    let own = |s: &crate::cloud::Signal| s.unique_id == INSTANCE_ID && s.resource == RESOURCE;
    ensure!(seen.signals.iter().all(own), "a signal is not this host's: {:?}", seen.signals);
    let seen = stage.cloud.group_state(GROUP)?;
    let said: Vec<&str> = seen.completions.iter().map(|c| c.result.as_str()).collect();
    ensure!(said == group, "the group was told {said:?}, not {group:?}");
    Ok(())
}
