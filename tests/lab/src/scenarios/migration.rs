//! Docker had data on the root disk before hostagent came: it is moved whole or not at all, and what
//! lies hidden beneath mounts is found.

use super::host;
use crate::disk;
use crate::guest::{Guest, Script};
use crate::stage::Stage;
use anyhow::{Context as _, Result, ensure};
use std::time::Duration;

/// Long enough for a run in emulation.
const RUN: Duration = Duration::from_secs(240);

/// What the containers write, without its being in any command line or log: the SHA-256 of a seed.
const SEED: &str = "a record of a patient from before";

/// All that matters of the data, wherever it is: the volume's files with owners, modes, times, links,
/// attributes and content, and what a container wrote and deleted.
const TRUTH: &str = "cd /var/lib/docker/volumes/records/_data && \
    find . -printf '%p %y %m %U %G %T@ %n %s %l\\n' | sort && \
    find . -type f -exec sha256sum {} + | sort && \
    docker diff writer | sort && docker cp writer:/record - | tar -xO";

/// Fills Docker: an image, a container that has ended, and a volume. Returns what it wrote.
fn fill(guest: &mut Guest) -> Result<String> {
    guest.sh("mkdir -p /run/busybox/bin && cp /bin/busybox /run/busybox/bin/ && \
         echo superseded > /run/busybox/superseded && \
         tar -C /run/busybox -c . | docker import - busybox:local")?;
    // At its second start it finds its file, and says so by its status.
    let write = format!(
        "docker run --network none --name writer -v records:/records busybox:local /bin/busybox sh -c '\
         export PATH=/bin; test -e /record && exec busybox grep -q . /record; \
         echo -n \"{SEED}\" | busybox sha256sum | busybox cut -c 1-64 > /record; \
         for i in 1 2 3 4 5 6 7 8; do busybox cat /record; done > /records/records; \
         busybox ln /records/records /records/again; busybox chown 1234:99 /records/records; \
         busybox chmod 4750 /records/records; busybox rm /superseded; \
         busybox dd if=/dev/zero of=/records/sparse bs=1 count=1 seek=67108863 2>/dev/null; \
         busybox touch -d 2001-02-03 /records/records; busybox sync' && sync"
    );
    guest.succeed(&Script::new(&write).deadline(Duration::from_secs(120)))?;
    let canary = guest.sh(&format!("echo -n \"{SEED}\" | sha256sum | cut -c 1-64"))?;
    let canary = canary.trim().to_owned();
    ensure!(canary.len() == 64, "no canary: {canary:?}");
    Ok(canary)
}

/// Expects the same truth as before, and nothing of it on the root disk.
fn expect_moved(guest: &mut Guest, truth: &str) -> Result<()> {
    let now = guest.sh(TRUTH)?;
    ensure!(now == truth, "what was moved is not what there was:\n{truth}\n{now}");
    guest
        .sh("test $(stat -c %b /var/lib/docker/volumes/records/_data/sparse) -lt 100")
        .context("the holes were filled")?;
    guest.sh("! ls -A /var/lib | grep hostagent-").context("an old copy is still there")?;
    guest.sh("! ls -A /data | grep hostagent-").context("an unfinished copy is still there")?;
    guest.sh("docker start -a writer").context("the container does not find its file")?;
    Ok(())
}

pub(super) fn migration(stage: &mut Stage) -> Result<()> {
    host::await_signals(stage)?;
    let guest = stage.guest()?;
    let canary = fill(guest)?;
    let truth = guest.sh(TRUTH)?;
    guest.sh("sync; echo 3 >/proc/sys/vm/drop_caches")?;
    ensure!(disk::contains(&stage.root_disk(), canary.as_bytes())?, "the canary is nowhere");
    let path = stage.attach(&host::volume(), host::DEVICE)?;
    host::provision(stage.guest()?, RUN)?;
    host::expect_ready(stage)?;
    host::expect_signals(stage, &["SUCCESS"], &["CONTINUE"])?;
    let guest = stage.guest()?;
    guest.sh("sync; echo 3 >/proc/sys/vm/drop_caches")?;
    ensure!(disk::contains(&path, canary.as_bytes())?, "the canary is not on the data disk");
    ensure!(
        !disk::contains(&stage.root_disk(), canary.as_bytes())?,
        "the canary is still on the root disk"
    );
    let guest = stage.guest()?;
    expect_moved(guest, &truth)?;
    // A second run has nothing to do.
    let plan = host::hostagent(guest, "plan")?;
    ensure!(plan.status == 0 && plan.stdout.ends_with("; 0 steps to do\n"), "{plan:?}");
    Ok(())
}

pub(super) fn running(stage: &mut Stage) -> Result<()> {
    host::await_signals(stage)?;
    stage.attach(&host::volume(), host::DEVICE)?;
    let guest = stage.guest()?;
    fill(guest)?;
    let truth = guest.sh(TRUTH)?;
    guest.sh(
        "docker run -d --network none --name worker busybox:local /bin/busybox sleep 1000000",
    )?;
    let started =
        "docker inspect -f '{{.State.Running}} {{.State.StartedAt}} {{.State.Pid}}' worker";
    let before = guest.sh(started)?;
    host::provision(guest, RUN)?;
    let (status, report) = host::verify(guest)?;
    ensure!(status == 1 && host::word(&report, "docker-storage") == "fail", "{report:#}");
    guest.sh("! test -e /run/hostagent/ready").context("the host is called ready")?;
    let now = guest.sh(started)?;
    ensure!(now == before && now.starts_with("true"), "the container was touched: {before} {now}");
    guest.sh("journalctl -b -o cat | grep -q 'and containers run ('").context("not said why")?;
    host::expect_signals(stage, &["FAILURE"], &["ABANDON"])?;

    // Now it may be stopped; and it even outlives its daemon.
    let guest = stage.guest()?;
    guest.sh(
        "echo '{\"live-restore\": true}' > /etc/docker/daemon.json && systemctl reload docker",
    )?;
    guest.until(
        "docker info -f '{{.LiveRestoreEnabled}}' | grep -q true",
        Duration::from_secs(20),
    )?;
    host::configure(guest, "docker", "[docker]\nmigrate = \"running\"\n")?;
    host::provision(guest, RUN)?;
    guest
        .sh("journalctl -b -o cat | grep -q 'stop the containers that outlive Docker'")
        .context("the container did not outlive Docker, or nobody stopped it")?;
    host::expect_ready(stage)?;
    let guest = stage.guest()?;
    expect_moved(guest, &truth)?;
    guest.sh("docker start worker && docker exec worker /bin/busybox true")?;
    Ok(())
}

pub(super) fn no_space(stage: &mut Stage) -> Result<()> {
    host::await_signals(stage)?;
    let mut volume = host::volume();
    volume.size = 1;
    stage.attach(&volume, host::DEVICE)?;
    let guest = stage.guest()?;
    guest.sh("docker volume create records && cd /var/lib/docker/volumes/records/_data && \
              echo precious > r && fallocate -l 1500M large")?;
    let invocations =
        "systemctl show -P InvocationID docker.service containerd.service docker.socket";
    let before = guest.sh(invocations)?;
    host::provision(guest, RUN)?;
    let (status, report) = host::verify(guest)?;
    ensure!(status == 1 && host::word(&report, "docker-storage") == "fail", "{report:#}");
    guest.sh("! test -e /run/hostagent/ready").context("the host is called ready")?;
    guest.sh("journalctl -b -o cat | grep -q 'does not fit on vol-'").context("not said why")?;
    ensure!(guest.sh(invocations)? == before, "Docker was stopped or started");
    guest.sh("docker volume ls -q | grep -q records && ! test -e /data/docker && \
              grep -q precious /var/lib/docker/volumes/records/_data/r")?;
    host::expect_signals(stage, &["FAILURE"], &["ABANDON"])
}

pub(super) fn interrupted(stage: &mut Stage) -> Result<()> {
    stage.attach(&host::volume(), host::DEVICE)?;
    let guest = stage.guest()?;
    fill(guest)?;
    // Enough that every part takes a while.
    guest.sh("cd /var/lib/docker/volumes/records/_data && mkdir many && \
              for i in $(seq 300); do echo $i > many/$i; done && \
              head -c 60M /dev/urandom > large && sync")?;
    let truth = guest.sh(TRUTH)?;
    // At each of these moments hostagent is killed, and a new run goes on.
    let moments = [
        "test -e /data/docker.hostagent-incoming",
        "test -e /data/docker.hostagent-incoming && sleep 0.7",
        "test -e /data/docker.hostagent-incoming && sleep 2",
        "test -e /data/docker",
        "ls -d /var/lib/.hostagent-migrated-docker-*",
        "ls -d /var/lib/.hostagent-migrated-docker-* && systemctl is-active docker.service && sleep 0.3",
    ];
    let whole = "cd /var/lib/docker/volumes/records/_data 2>/dev/null || \
                 cd /data/docker/volumes/records/_data && \
                 test $(ls many | wc -l) = 300 && sha256sum large";
    let large = guest.sh(whole)?;
    let mut killed = 0;
    for moment in moments {
        guest.sh("systemctl reset-failed hostagent.service; systemctl start --no-block hostagent.service")?;
        let pid = "systemctl show -P MainPID hostagent.service";
        let kill = format!(
            "until {{ {moment}; }} >/dev/null 2>&1; do \
             case $(systemctl show -P ActiveState hostagent.service) in inactive|failed) exit 1;; esac; \
             sleep 0.02; done; kill -9 $({pid})"
        );
        let ended = guest.run(&Script::new(&kill).deadline(RUN))?;
        killed += u32::from(ended.status == 0);
        host::settled(guest, RUN)?;
        let now = guest.sh(whole)?;
        ensure!(now == large, "the data is not whole after a kill when `{moment}`: {now}");
        guest.sh("! test -e /run/hostagent/ready").or_else(|e| {
            // Too fast to be killed: then it must be ready in truth.
            if ended.status == 0 { Err(e) } else { Ok(String::new()) }
        })?;
    }
    ensure!(killed >= 4, "only {killed} runs were killed");
    host::provision(stage.guest()?, RUN)?;
    host::expect_ready(stage)?;
    expect_moved(stage.guest()?, &truth)
}

/// Stops Docker, and starts it by hand: neither the gate nor the drop-ins are in its way.
const BY_HAND: &str = "systemctl stop docker.socket docker.service containerd.service && \
    mkdir -p /srv/store && mv /var/lib/docker /srv/store/docker && \
    ln -s /srv/store/docker /var/lib/docker && \
    systemd-run --quiet --unit by-hand dockerd -H unix:///run/docker.sock";

pub(super) fn linked(stage: &mut Stage) -> Result<()> {
    host::await_signals(stage)?;
    let guest = stage.guest()?;
    // The old recipe. Docker writes down where the link leads.
    guest.sh(BY_HAND)?;
    guest.until("docker info >/dev/null 2>&1", Duration::from_secs(60))?;
    let canary = fill(guest)?;
    let root = guest.sh("docker info -f '{{.DockerRootDir}}'")?;
    ensure!(root.trim() == "/srv/store/docker", "Docker's root directory is {root}");
    let truth = guest.sh(TRUTH)?;
    guest.sh("systemctl stop by-hand.service && sync")?;
    let path = stage.attach(&host::volume(), host::DEVICE)?;
    host::provision(stage.guest()?, RUN)?;
    host::expect_ready(stage)?;
    host::expect_signals(stage, &["SUCCESS"], &["CONTINUE"])?;
    let guest = stage.guest()?;
    expect_moved(guest, &truth)?;
    guest.sh("! ls -A /srv/store | grep -q . && ! test -L /var/lib/docker")?;
    guest.sh("sync; echo 3 >/proc/sys/vm/drop_caches")?;
    ensure!(disk::contains(&path, canary.as_bytes())?, "the canary is not on the data disk");
    ensure!(
        !disk::contains(&stage.root_disk(), canary.as_bytes())?,
        "the canary is still on the root disk"
    );

    // A link to where hostagent keeps it.
    let guest = stage.guest()?;
    let down = "systemctl stop docker.socket docker.service containerd.service && \
                systemctl stop var-lib-docker.mount";
    guest.sh(&format!("{down} && rmdir /var/lib/docker && ln -s /data/docker /var/lib/docker"))?;
    let plan = host::hostagent(guest, "plan")?;
    ensure!(plan.stdout.contains("make /var/lib/docker a directory instead of a link"), "{plan:?}");
    host::provision(guest, RUN)?;
    host::expect_ready(stage)?;
    let guest = stage.guest()?;
    guest.sh("! test -L /var/lib/docker")?;
    expect_moved(guest, &truth)?;

    // A link inside of it, which leads off the volume: Docker does not start, and is told what to do.
    let guest = stage.guest()?;
    guest.sh("systemctl stop docker.socket docker.service containerd.service && \
         mv /var/lib/docker/overlay2 /srv/ && \
         ln -s /srv/overlay2 /var/lib/docker/overlay2 && ! systemctl start docker.service")?;
    host::provision(guest, RUN)?;
    host::expect_not_ready(stage, &[("docker-storage", "fail")])?;
    let guest = stage.guest()?;
    let gate = host::hostagent(guest, "gate")?;
    ensure!(
        gate.status == 1
            && gate.stderr.contains("/var/lib/docker/overlay2 is a link to /srv/overlay2"),
        "{gate:?}"
    );
    guest.sh("test -d /srv/overlay2/l && rm /var/lib/docker/overlay2 && mv /srv/overlay2 /var/lib/docker/")?;
    host::provision(guest, RUN)?;
    host::expect_ready(stage)?;
    expect_moved(stage.guest()?, &truth)?;

    // And on the root disk, before it is moved: nothing is stopped, and nothing moved.
    let guest = stage.guest()?;
    guest.sh(&format!(
        "{down} && mkdir -p /srv/layers /var/lib/docker/volumes/v/_data && \
         ln -s /srv/layers /var/lib/docker/overlay2"
    ))?;
    host::provision(guest, RUN)?;
    host::expect_not_ready(stage, &[("docker-storage", "fail")])?;
    let guest = stage.guest()?;
    guest
        .sh("journalctl -b -u hostagent.service -o cat | grep -q '/var/lib/docker/overlay2 is a link to /srv/layers, where that would stay'")
        .context("not said why")?;
    guest.sh("test -L /var/lib/docker/overlay2 && test -d /var/lib/docker/volumes/v/_data && \
              rm -r /var/lib/docker/overlay2 /var/lib/docker/volumes")?;

    // A link to another disk is left as it is, and so is what is there.
    guest.sh(&format!(
        "{down} && rmdir /var/lib/docker && mkdir -p /run/disk/docker/volumes/v && \
         ln -s /run/disk/docker /var/lib/docker"
    ))?;
    host::provision(guest, RUN)?;
    host::expect_not_ready(stage, &[("docker-storage", "fail")])?;
    let guest = stage.guest()?;
    guest
        .sh("journalctl -b -u hostagent.service -o cat | grep -q 'is a link to /run/disk/docker: /run/disk/docker is on another mount'")
        .context("not said why")?;
    guest.sh("test -L /var/lib/docker && test -d /run/disk/docker/volumes/v").map(drop)
}

pub(super) fn hidden(stage: &mut Stage) -> Result<()> {
    stage.attach(&host::volume(), host::DEVICE)?;
    let guest = stage.guest()?;
    host::provision(guest, RUN)?;
    host::expect_ready(stage)?;
    let guest = stage.guest()?;
    guest.sh("mount --bind / /mnt && chattr -i /mnt/data && echo lost > /mnt/data/records && \
              mkdir -p /mnt/var/lib/docker/volumes/old/_data && \
              echo lost > /mnt/var/lib/docker/volumes/old/_data/r && umount /mnt")?;
    let mounts = guest.sh("cat /proc/1/mountinfo")?;
    let (status, report) = host::verify(guest)?;
    ensure!(status == 1 && host::word(&report, "data-mount") == "fail", "{report:#}");
    let text = report.to_string();
    ensure!(
        text.contains("/data/records and more") && text.contains("mount --bind / /mnt"),
        "{text}"
    );
    // Nothing is removed, and readiness is taken back.
    host::provision(guest, RUN)?;
    guest.sh("! test -e /run/hostagent/ready").context("the host is still called ready")?;
    guest
        .sh("mount --bind / /mnt && rm /mnt/data/records && chattr +i /mnt/data && umount /mnt")?;
    let (status, report) = host::verify(guest)?;
    ensure!(status == 1 && host::word(&report, "data-mount") == "pass", "{report:#}");
    ensure!(host::word(&report, "docker-storage") == "fail", "{report:#}");
    ensure!(report.to_string().contains("/var/lib/docker/volumes/old and more"), "{report:#}");
    host::provision(guest, RUN)?;
    guest
        .sh("mount --bind / /mnt && grep -q lost /mnt/var/lib/docker/volumes/old/_data/r && \
              rm -r /mnt/var/lib/docker/volumes/old && umount /mnt")
        .context("hidden data was touched")?;
    ensure!(guest.sh("cat /proc/1/mountinfo")? == mounts, "looking left a mount");
    // What keeps the next boot from writing there without the volume is put back.
    let flag = |change: &str| format!("mount --bind / /mnt && {change} && umount /mnt");
    guest.sh(&flag("chattr -i /mnt/data"))?;
    let (status, report) = host::verify(guest)?;
    ensure!(status == 1 && report.to_string().contains("is not immutable"), "{report:#}");
    host::provision(guest, RUN)?;
    host::expect_ready(stage)?;
    let guest = stage.guest()?;
    guest.sh(&flag("lsattr -d /mnt/data | grep -q '^[^ ]*i'")).context("still writable").map(drop)
}
