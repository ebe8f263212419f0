//! Docker's own configuration: put right in the operator's file, without losing what is his, stopping
//! a container or leaving a Docker behind that does not start.

use super::host;
use crate::guest::{Guest, Script};
use crate::stage::Stage;
use anyhow::{Context as _, Result, ensure};
use std::time::Duration;

/// Long enough for a run in emulation.
const RUN: Duration = Duration::from_secs(300);

const FILE: &str = "/etc/docker/daemon.json";

/// The operator's file: keys in an order of his own, one of them against what is asked for, and an
/// escape that nobody else would write.
const OWN: &str = r#"{"shutdown-timeout": 7, "labels": [ "site=\u0041" ],
"icc":true, "log-opts": {"tag": "{{.Name}}"}, "debug": false, "max-concurrent-uploads": 3}"#;

/// Has Docker run with this file.
fn with_file(guest: &mut Guest, text: &str) -> Result<()> {
    guest.sh("mkdir -p /etc/docker")?;
    guest.write(FILE, text.as_bytes())?;
    restart(guest)
}

fn restart(guest: &mut Guest) -> Result<()> {
    let script = "systemctl reset-failed docker.service; systemctl restart docker.service";
    guest.succeed(&Script::new(script).deadline(RUN)).map(drop)
}

fn invocation(guest: &mut Guest) -> Result<String> {
    guest.sh("systemctl show -P InvocationID docker.service containerd.service")
}

/// How often Docker has come up in this boot.
fn starts(guest: &mut Guest) -> Result<u32> {
    let count =
        "journalctl -b -u docker.service -o cat | grep -c 'completed initialization' || true";
    Ok(guest.sh(count)?.trim().parse()?)
}

/// Expects a run that ends without readiness, and these words in its journal.
fn expect_refused(guest: &mut Guest, words: &str) -> Result<()> {
    host::provision(guest, RUN)?;
    guest.sh("! test -e /run/hostagent/ready").context("the host is called ready")?;
    let run = "_SYSTEMD_INVOCATION_ID=$(systemctl show -P InvocationID hostagent.service)";
    let journal = guest.sh(&format!("journalctl -b -o cat {run}"))?;
    ensure!(journal.contains(words), "the journal does not say {words:?}: {journal}");
    guest.sh("systemctl is-active docker.service containerd.service").map(drop)
}

pub(super) fn daemon(stage: &mut Stage) -> Result<()> {
    host::await_signals(stage)?;
    stage.attach(&host::volume(), host::DEVICE)?;
    let guest = stage.guest()?;
    guest.sh("mkdir -p /etc/docker")?;
    guest.write(FILE, OWN.as_bytes())?;
    guest.sh(&format!("chmod 0640 {FILE}"))?;
    let before = starts(guest)?;
    host::provision(guest, RUN)?;
    host::expect_ready(stage)?;
    host::expect_signals(stage, &["SUCCESS"], &["CONTINUE"])?;
    let guest = stage.guest()?;
    ensure!(starts(guest)? == before + 1, "Docker was started more than once");
    expect_in_force(guest)?;
    expect_kept(guest)?;
    // A second run has nothing to do.
    let (was, file) = (invocation(guest)?, guest.sh(&format!("stat -c '%i %z' {FILE}"))?);
    let plan = host::hostagent(guest, "plan")?;
    ensure!(plan.status == 0 && plan.stdout.ends_with("; 0 steps to do\n"), "{plan:?}");
    host::provision(guest, RUN)?;
    ensure!(invocation(guest)? == was, "Docker was restarted for nothing");
    ensure!(guest.sh(&format!("stat -c '%i %z' {FILE}"))? == file, "the file was written again");

    running(guest)?;
    refused(guest)?;
    flags(guest)?;
    guest.sh(&format!("rm {FILE}"))?;
    restart(guest)?;
    // With no file there, and Docker on its volume.
    host::provision(guest, RUN)?;
    host::expect_ready(stage)
}

/// What Docker does, by its own account and by that of a container.
fn expect_in_force(guest: &mut Guest) -> Result<()> {
    let info = guest.sh(
        "docker info -f '{{.LiveRestoreEnabled}} {{.SecurityOptions}} {{.LoggingDriver}}' && \
         docker network inspect bridge \
         -f 'icc={{index .Options \"com.docker.network.bridge.enable_icc\"}}'",
    )?;
    // Docker 20.10 does not name no-new-privileges; a container tells below.
    for words in ["true [", "name=apparmor", "name=seccomp", "icc=false"] {
        ensure!(info.contains(words), "docker info does not say {words}: {info}");
    }
    guest.sh("mkdir -p /run/busybox/bin && cp /bin/busybox /run/busybox/bin/ && \
              tar -C /run/busybox -c . | docker import - busybox:local")?;
    let run = "docker run --rm --network none busybox:local /bin/busybox grep NoNewPrivs /proc/self/status";
    let seen = guest.succeed(&Script::new(run).deadline(Duration::from_secs(120)))?;
    ensure!(seen.ends_with("\t1\n"), "a container says {seen:?}");
    let log = guest.sh(
        "docker create --network none --name logged busybox:local true >/dev/null && \
         docker inspect -f '{{json .HostConfig.LogConfig.Config}}' logged && docker rm logged >/dev/null",
    )?;
    for words in ["\"max-size\":\"10m\"", "\"max-file\":\"5\""] {
        ensure!(log.contains(words), "a container's log: {log}");
    }
    Ok(())
}

/// The operator's keys, in his order, as he wrote them; his file's mode; and what he set in force.
fn expect_kept(guest: &mut Guest) -> Result<()> {
    let text = guest.sh(&format!("cat {FILE} && stat -c 'mode %a %U' {FILE}"))?;
    let mut rest = text.as_str();
    for words in [
        "\"shutdown-timeout\": 7",
        "\"labels\": [ \"site=\\u0041\" ]",
        "\"icc\": false",
        "\"tag\": \"{{.Name}}\"",
        "\"debug\": false",
        "\"max-concurrent-uploads\": 3",
        "\"live-restore\": true",
        "mode 640 root",
    ] {
        let at = rest
            .find(words)
            .with_context(|| format!("{words} is not there, or not in order: {text}"))?;
        rest = &rest[at..];
    }
    guest.sh("docker info -f '{{.Labels}}' | grep -q 'site=A'").map(drop)
}

/// A container that runs goes on, and keeps Docker from being restarted.
fn running(guest: &mut Guest) -> Result<()> {
    with_file(guest, "{}")?;
    let run = "docker run -d --network none --name worker busybox:local /bin/busybox sleep 1000000";
    guest.succeed(&Script::new(run).deadline(Duration::from_secs(120)))?;
    let state = "docker inspect -f '{{.State.Pid}} {{.State.StartedAt}} {{.State.Running}}' worker";
    let (before, was) = (guest.sh(state)?, invocation(guest)?);
    expect_refused(
        guest,
        "Docker takes the rest up only when it is started, and containers run (",
    )?;
    ensure!(guest.sh(state)? == before, "the container was touched");
    ensure!(invocation(guest)? == was, "Docker was restarted under a container");
    // What needs no restart is in force.
    guest.sh("docker info -f '{{.LiveRestoreEnabled}}' | grep -qx true")?;
    expect_refused(guest, "containers run (")?;
    guest.sh("docker rm -f worker")?;
    host::provision(guest, RUN)?;
    guest.sh("test -s /run/hostagent/ready").context("not ready without the container")?;
    expect_in_force(guest)
}

/// What Docker does not accept, before and after it is in place.
fn refused(guest: &mut Guest) -> Result<()> {
    // Accepted as a file, and refused at the start: without iptables it cannot do what icc asks for.
    let text = "{ \"iptables\": false }";
    with_file(guest, text)?;
    expect_refused(guest, "is as it was before, and Docker with it")?;
    ensure!(guest.sh(&format!("cat {FILE}"))? == text, "the file is not as it was");
    // Docker runs, and its next start would fail: that is seen before anything is done.
    let text = "{ \"no-such-key\": 1 }";
    guest.write(FILE, text.as_bytes())?;
    let was = invocation(guest)?;
    expect_refused(guest, "Docker does not accept the new configuration")?;
    ensure!(invocation(guest)? == was, "Docker was restarted with a file that it does not accept");
    ensure!(guest.sh(&format!("cat {FILE}"))? == text, "the file was changed");
    guest
        .sh("! ls -A /etc/docker | grep hostagent && ! test -e /run/hostagent/daemon-trial.json")?;
    Ok(())
}

/// A flag in the unit, and an API for everybody.
fn flags(guest: &mut Guest) -> Result<()> {
    let drop_in = "/etc/systemd/system/docker.service.d/operator.conf";
    let unit = "mkdir -p /etc/systemd/system/docker.service.d && \
                exec=$(systemctl cat docker.service | grep ^ExecStart= | tail -n 1 | cut -d ' ' -f 1)";
    let told =
        "-H fd:// -H tcp://127.0.0.1:2375 --containerd=/run/containerd/containerd.sock --icc=true";
    guest.sh(&format!(
        "{unit} && printf '[Service]\\nExecStart=\\n%s {told}\\n' \"$exec\" > {drop_in} && \
         systemctl daemon-reload"
    ))?;
    with_file(guest, "{}")?;
    expect_refused(guest, "dockerd's command line sets icc to true")?;
    let (status, report) = host::verify(guest)?;
    ensure!(status == 1 && host::word(&report, "docker-daemon") == "fail", "{report:#}");
    let text = report.to_string();
    for words in ["Docker answers anybody who reaches 127.0.0.1:2375", "CIS 2.7", "CIS 2.2"] {
        ensure!(text.contains(words), "{words} is not said: {report:#}");
    }
    ensure!(!text.contains("CIS 2.15"), "the rest was not put right: {report:#}");
    // What the flag sets is not in the file, or Docker would not start.
    guest.sh(&format!("! grep -q icc {FILE} && grep -q live-restore {FILE}"))?;
    host::configure(guest, "report", "[docker]\ndaemon = \"report\"\n")?;
    let seen = host::hostagent(guest, "verify")?;
    ensure!(
        seen.status == 0 && seen.stdout.contains("WARNING: Docker answers anybody"),
        "{seen:?}"
    );
    guest.sh(&format!(
        "rm /etc/hostagent/conf.d/report.toml {drop_in} && systemctl daemon-reload"
    ))?;
    restart(guest)?;
    host::provision(guest, RUN)?;
    guest.sh("test -s /run/hostagent/ready").context("not ready without the flags")?;
    expect_in_force(guest)
}
