//! What the containers that run can write to: told by the kernel, whatever the daemon says, in both
//! of the ways in which Docker keeps layers.

use super::host;
use crate::guest::{Guest, Script};
use crate::stage::Stage;
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use std::time::{Duration, Instant};

/// Long enough for a run in emulation.
const RUN: Duration = Duration::from_secs(240);

/// An image to run containers from.
const IMPORT: &str = "mkdir -p /run/busybox/bin && cp /bin/busybox /run/busybox/bin/ && \
    tar -C /run/busybox -c . | docker import - busybox:local";

/// Starts a container that stays.
fn start(guest: &mut Guest, name: &str, options: &str) -> Result<()> {
    let run = format!(
        "docker run -d --network none --name {name} {options} busybox:local \
         /bin/busybox sleep 1000000"
    );
    guest.succeed(&Script::new(&run).deadline(Duration::from_secs(120))).map(drop)
}

fn remove(guest: &mut Guest, name: &str) -> Result<()> {
    guest.sh(&format!("docker rm -f {name}")).map(drop)
}

/// The verdict of the control, and its sentence.
fn judged(guest: &mut Guest) -> Result<(String, String)> {
    let (_, report) = host::verify(guest)?;
    let controls = report["controls"].as_array().map(Vec::as_slice).unwrap_or_default();
    let verdict = controls.iter().find(|c| c["id"] == "container-storage");
    let verdict = verdict.map_or(&Value::Null, |c| &c["verdict"]);
    let text = |key: &str| verdict[key].as_str().unwrap_or_default();
    Ok((text("status").to_owned(), format!("{}{}", text("observed"), text("why"))))
}

/// Expects a verdict whose sentence has all these words.
fn expect(guest: &mut Guest, verdict: &str, words: &[&str]) -> Result<()> {
    let (status, sentence) = judged(guest)?;
    let is = status == verdict && words.iter().all(|word| sentence.contains(word));
    ensure!(is, "container-storage is {status}, not {verdict} with {words:?}: {sentence}");
    Ok(())
}

/// Containers of every kind on a ready host, of which each that leaves the volume is named.
pub(super) fn kinds(guest: &mut Guest, keeps: &str) -> Result<()> {
    guest.succeed(&Script::new(IMPORT).deadline(Duration::from_secs(120)))?;
    expect(guest, "pass", &["no container runs", keeps])?;
    guest.sh("mkdir -p /data/scratch /srv/records /srv/allowed && echo x > /srv/allowed/x")?;
    // A volume, a directory of the data volume, memory, what programs want of the host, and the
    // program that Docker itself mounts for --init.
    start(
        guest,
        "good",
        "--init -v records:/records -v /data/scratch:/scratch --tmpfs /memory \
         -v /etc/localtime:/etc/localtime:ro -v /etc/ssl/certs:/etc/ssl/certs \
         -v /lib/modules:/lib/modules:ro -v /var/run/docker.sock:/var/run/docker.sock \
         -v /proc:/host/proc:ro -v /sys:/host/sys:ro -v /dev:/host/dev",
    )?;
    let own = "docker exec good /bin/busybox sh -c 'echo x > /records/a && echo x > /scratch/a'";
    guest.sh(own)?;
    expect(guest, "pass", &["the 1 container that runs writes to vol-", keeps])?;

    start(guest, "bad", "-v /srv/records:/records")?;
    expect(
        guest,
        "fail",
        &["container bad (", "/srv/records mounted on /records, which is on the"],
    )?;
    remove(guest, "bad")?;
    // Read-only, and with all that is mounted on the host.
    start(guest, "watcher", "-v /:/host:ro")?;
    expect(guest, "fail", &["container watcher (", " / mounted on /host, read-only"])?;
    remove(guest, "watcher")?;
    // A volume that Docker calls local, and that is elsewhere. By this it is mounted in Docker's own
    // storage, too, which closes the gate.
    guest.sh("docker volume create -o type=none -o o=bind -o device=/srv/records hidden")?;
    start(guest, "volume", "-v hidden:/records")?;
    expect(guest, "fail", &["container volume (", "/srv/records mounted on /records"])?;
    guest.sh("! hostagent gate")?;
    remove(guest, "volume")?;

    start(guest, "named", "-v /srv/allowed:/allowed:ro")?;
    expect(guest, "fail", &["container named (", "/srv/allowed mounted on /allowed, read-only"])?;
    host::configure(
        guest,
        "mounts",
        "[docker]\nallowed_mounts = [\"/etc/localtime\", \"/etc/ssl/certs\", \"/lib/modules\", \
         \"/usr/sbin/docker-init\", \"/usr/bin/docker-init\", \"/usr/libexec/docker/docker-init\", \
         \"/srv/allowed\"]\n",
    )?;
    expect(guest, "pass", &["the 2 containers that run write to vol-"])?;
    remove(guest, "named")?;
    guest.sh("rm /etc/hostagent/conf.d/mounts.toml").map(drop)
}

pub(super) fn containers(stage: &mut Stage) -> Result<()> {
    host::await_signals(stage)?;
    stage.attach(&host::volume(), host::DEVICE)?;
    let guest = stage.guest()?;
    host::provision(guest, RUN)?;
    host::expect_ready(stage)?;
    let guest = stage.guest()?;
    kinds(guest, "layers in /var/lib/docker (overlay2)")?;

    // Containers that come and go while they are looked at are nothing unknown.
    guest.start(
        "while ! test -e /run/enough; do docker run --rm --network none busybox:local \
         /bin/busybox true; done; touch /run/ended",
    )?;
    for _ in 0..5 {
        expect(guest, "pass", &["on", "write"])?;
    }
    guest.sh("touch /run/enough")?;
    guest.until("test -e /run/ended", Duration::from_secs(60))?;

    // A process that left its container for the host's own root is no container's matter any more.
    guest.sh(
        "docker run -d --network none --privileged --pid host --name fugitive busybox:local \
         /bin/busybox sh -c 'while :; do /bin/busybox sleep 1; done' && \
         docker exec -d --privileged fugitive /bin/busybox nsenter -t 1 -m sleep 1000000",
    )?;
    expect(guest, "fail", &["container fugitive (", "/ mounted on /, which is on the device"])?;
    guest.sh("docker rm -f fugitive; pkill -f 'sleep 1000000$' -P 1; true")?;

    // The look takes back what the host says of itself.
    start(guest, "bad", "-v /srv/records:/records")?;
    host::provision(guest, RUN)?;
    guest
        .sh("! test -e /run/hostagent/ready && ! systemctl is-active --quiet hostagent-ready.target")
        .context("the host is still called ready")?;
    guest.sh("docker inspect -f '{{.State.Running}}' bad | grep -q true").context("was stopped")?;
    remove(guest, "bad")?;
    host::provision(guest, RUN)?;
    host::expect_ready(stage)
}

pub(super) fn image_store(stage: &mut Stage) -> Result<()> {
    stage.attach(&host::volume(), host::DEVICE)?;
    let guest = stage.guest()?;
    guest.sh("mkdir -p /etc/docker && \
         echo '{\"features\": {\"containerd-snapshotter\": true}}' > /etc/docker/daemon.json")?;
    host::provision(guest, RUN)?;
    host::expect_ready(stage)?;
    let guest = stage.guest()?;
    guest.sh("docker info -f '{{.DriverStatus}}' | grep -q io.containerd.snapshotter")?;
    kinds(guest, "layers in containerd (overlayfs)")?;
    // That is where the layers truly are.
    let upper = guest.sh("grep -ho 'upperdir=[^,]*' /proc/$(docker inspect -f '{{.State.Pid}}' good)/mountinfo | head -n 1")?;
    ensure!(upper.starts_with("upperdir=/var/lib/containerd/"), "the writable layer is {upper}");
    // Somebody else's containers, of which Docker knows nothing.
    guest.sh("mkdir -p /srv/root/bin && cp /bin/busybox /srv/root/bin && \
         ctr -n other run -d --rootfs /srv/root stranger /bin/busybox sleep 1000000")?;
    expect(guest, "fail", &["container stranger has /srv/root mounted on /"])?;
    guest.sh("ctr -n other task kill -s KILL stranger; sleep 1; ctr -n other task rm stranger; ctr -n other c rm stranger")?;
    expect(guest, "pass", &["the 1 container that runs"])
}

pub(super) fn hung(stage: &mut Stage) -> Result<()> {
    stage.attach(&host::volume(), host::DEVICE)?;
    let guest = stage.guest()?;
    host::provision(guest, RUN)?;
    guest.succeed(&Script::new(IMPORT).deadline(Duration::from_secs(120)))?;
    start(guest, "good", "-v records:/records")?;
    hangs(stage)
}

/// The daemon hangs, on a ready host with one container that is all right.
pub(super) fn hangs(stage: &mut Stage) -> Result<()> {
    let guest = stage.guest()?;
    expect(guest, "pass", &["the 1 container that runs"])?;
    guest.sh("kill -STOP $(systemctl show -P MainPID docker.service)")?;
    let begun = Instant::now();
    expect(
        guest,
        "unknown",
        &["no answer to /info within 15s", "1 container that runs writes to vol-"],
    )?;
    let took = begun.elapsed();
    ensure!(took < Duration::from_secs(45), "verify took {took:?}");
    let (status, report) = host::verify(guest)?;
    ensure!(status == 2, "verify ended with {status}: {report:#}");
    let asks_docker = ["container-storage", "docker-daemon"];
    for control in host::CONTROLS.into_iter().filter(|id| !asks_docker.contains(id)) {
        ensure!(host::word(&report, control) == "pass", "{control}: {report:#}");
    }
    // A run says so, and ends.
    let begun = Instant::now();
    host::provision(guest, RUN)?;
    ensure!(begun.elapsed() < Duration::from_secs(150), "the run took {:?}", begun.elapsed());
    guest.sh("! test -e /run/hostagent/ready").context("the host is called ready")?;

    // What leaves the volume is seen without the daemon: made by its own hand, which does not answer.
    guest.sh("kill -CONT $(systemctl show -P MainPID docker.service)")?;
    guest.sh("mkdir -p /srv/records")?;
    start(guest, "bad", "-v /srv/records:/records")?;
    guest.sh("kill -STOP $(systemctl show -P MainPID docker.service)")?;
    expect(guest, "fail", &["container bad (", "/srv/records mounted on /records"])?;
    guest.sh("kill -CONT $(systemctl show -P MainPID docker.service)")?;
    remove(guest, "bad")?;
    host::provision(guest, RUN)?;
    host::expect_ready(stage)
}
