//! A host becomes ready: by user-data at its first boot, from a bare host, and with a volume that
//! comes late; and a second run finds nothing to do.

use super::host;
use crate::cloud::Instance;
use crate::cloud::Volume;
use crate::disk;
use crate::guest::{Guest, Script};
use crate::snapshot;
use crate::stage::Stage;
use crate::userdata;
use anyhow::{Context as _, Result, ensure};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Long enough for a run in emulation.
const RUN: Duration = Duration::from_secs(300);

/// Everything that a run could have written or restarted: each file's time of change and inode where
/// hostagent and the services it manages keep things (what Docker itself writes is left out), and
/// each service's invocation.
const TRACES: &str = "find /etc /data /run/hostagent /var/lib/hostagent /usr/lib/systemd -xdev \
    -not -path '/data/containerd/*' -not -path '/data/docker/*' -printf '%p %C@ %i\\n' | sort; \
    systemctl show -P Id -P InvocationID -P ActiveEnterTimestampMonotonic docker.service \
    containerd.service ssh.service docker.socket data.mount var-lib-docker.mount \
    var-lib-containerd.mount hostagent-ready.target; cat /proc/self/mountinfo | sort";

pub(super) fn cold_boot(stage: &mut Stage) -> Result<()> {
    let user_data = userdata::installing(stage.props.package()?, &stage.cloud)?;
    // Who waits is told by the instance's tags alone.
    let tags = [
        ("aws:cloudformation:stack-name", host::STACK),
        ("aws:cloudformation:logical-id", host::RESOURCE),
        ("hostagent:lifecycle-hook", host::HOOK),
    ];
    let tags: BTreeMap<_, _> = tags.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
    let instance = Instance { user_data: Some(user_data), tags, ..Instance::default() };
    stage.boot(&instance)?;
    stage.cloud.stack(host::STACK, &[host::RESOURCE], 1)?;
    stage.cloud.group(host::GROUP, "Pending:Wait", host::HOOK)?;
    snapshot::booted(stage.vm()?)?;
    // cloud-init is done, and hostagent still waits for the volume: neither waited for the other.
    let guest = stage.guest()?;
    guest.sh("grep -q '\"errors\": \\[\\]' /run/cloud-init/result.json")?;
    guest
        .sh("systemctl is-active hostagent.service")
        .context("hostagent does not wait any more")?;
    guest
        .until("! systemctl is-active --quiet docker.service", Duration::from_secs(60))
        .context("Docker runs already")?;
    guest.sh("test -e /var/lib/cloud/instance/boot-finished")?;

    stage.attach(&host::volume(), host::DEVICE)?;
    host::settled(stage.guest()?, RUN)?;
    host::expect_ready(stage)?;
    host::expect_signals(stage, &["SUCCESS"], &["CONTINUE"])?;
    let serial = stage.vm()?.serial();
    for line in
        ["hostagent: data-volume: EC2 has no volume attached", "hostagent: this host is ready"]
    {
        ensure!(serial.contains(line), "the console does not show {line:?}");
    }
    Ok(())
}

pub(super) fn becomes_ready(stage: &mut Stage) -> Result<()> {
    // Nobody has taken care of sshd.
    stage.guest()?.sh(&format!("rm {}", snapshot::SSHD_FRAGMENT))?;
    host::await_signals(stage)?;
    stage.attach(&host::volume(), host::DEVICE)?;
    host::provision(stage.guest()?, RUN)?;
    host::expect_ready(stage)?;
    host::expect_signals(stage, &["SUCCESS"], &["CONTINUE"])?;
    // The gate needs no child process (one task, itself) and no network (no socket at all).
    let alone = "systemd-run --wait --pipe --quiet -p TasksMax=1 -p SystemCallFilter=~@network-io \
                 /usr/bin/hostagent gate";
    stage.guest()?.sh(alone)?;
    let calls = stage.cloud.calls()?;
    super::identity::expect_chain(stage.guest()?)?;
    let ec2 = calls.iter().filter(|call| call.service == "ec2").count();
    // Two runs: provision, and the verify of expect_ready.
    ensure!(ec2 <= 3 + 2, "{ec2} calls to EC2: {calls:?}");
    Ok(())
}

pub(super) fn second_run(stage: &mut Stage) -> Result<()> {
    host::await_signals(stage)?;
    stage.attach(&host::volume(), host::DEVICE)?;
    let guest = stage.guest()?;
    let plan = host::hostagent(guest, "plan")?;
    ensure!(plan.stdout.contains("would     format the blank volume"), "{plan:?}");
    guest.sh("! test -e /data && ! test -e /run/hostagent").context("plan changed something")?;

    host::provision(guest, RUN)?;
    let before = guest.sh(TRACES)?;
    let plan = host::hostagent(guest, "plan")?;
    ensure!(plan.status == 0 && plan.stdout.ends_with("; 0 steps to do\n"), "{plan:?}");
    let second = host::hostagent(guest, "provision --format json")?;
    ensure!(second.status == 0, "{second:?}");
    let report: serde_json::Value = serde_json::from_str(&second.stdout)?;
    ensure!(report["ready"] == true && report["signals"] == serde_json::json!([]), "{report:#}");
    for control in report["controls"].as_array().into_iter().flatten() {
        ensure!(control.get("steps").is_none(), "a step was applied: {control:#}");
    }
    let after = guest.sh(TRACES)?;
    ensure!(before == after, "a second run left traces:\n{}", difference(&before, &after));
    host::expect_signals(stage, &["SUCCESS"], &["CONTINUE"])
}

/// The lines that are not in both.
fn difference(before: &str, after: &str) -> String {
    let only = |mark: &'static str, these: &str, those: &str| -> String {
        let missing = |line: &&str| !those.lines().any(|other| other == *line);
        these.lines().filter(missing).flat_map(|line| [mark, " ", line, "\n"]).collect()
    };
    only("-", before, after) + &only("+", after, before)
}

pub(super) fn late_volume(stage: &mut Stage) -> Result<()> {
    host::await_signals(stage)?;
    let begun = Instant::now();
    stage.guest()?.sh("systemctl start --no-block hostagent.service")?;
    let waits = "journalctl -b -u hostagent.service -o cat | grep -q 'waiting for it'";
    stage.guest()?.until(waits, Duration::from_secs(30))?;
    std::thread::sleep(Duration::from_secs(40).saturating_sub(begun.elapsed()));
    let asked = ec2_calls(stage)?;
    stage.guest()?.start("exec udevadm monitor --kernel --subsystem-match=block >/run/events")?;
    stage.guest()?.until("grep -q KERNEL /run/events", Duration::from_secs(10))?;
    stage.attach(&host::volume(), host::DEVICE)?;
    host::settled(stage.guest()?, RUN)?;
    mkfs_began_at_once(stage.guest()?)?;
    let calls = ec2_calls(stage)?;
    ensure!(asked <= 2 && calls <= 3, "{asked} calls to EC2 while waiting, {calls} in all");
    host::expect_ready(stage)?;
    host::expect_signals(stage, &["SUCCESS"], &["CONTINUE"])
}

/// Expects that mkfs began before EC2 had confirmed the volume, and at once after the kernel's event, as
/// far as a busy machine can tell; and says how long after: by udev's clock and the journal's, which is the
/// kernel's monotonic one for both.
fn mkfs_began_at_once(guest: &mut Guest) -> Result<()> {
    let journal = |pattern: &str| {
        format!(
            "journalctl -b -u hostagent.service -o json --output-fields=MESSAGE | grep '{pattern}' | \
             sed 's/.*\"__MONOTONIC_TIMESTAMP\":\"\\([0-9]*\\)\".*/\\1/' | head -n 1"
        )
    };
    let mut number = |script: &str| -> Result<u64> {
        let text = guest.sh(script)?;
        text.trim().parse().with_context(|| format!("{script}: {text:?}"))
    };
    let event = number(
        "sed -n 's/^KERNEL\\[\\([0-9]*\\)\\.\\([0-9]*\\)\\] *add .*\\/nvme0n1 (block)$/\\1\\2/p' /run/events",
    )?;
    let (mkfs, confirmed) =
        (number(&journal("mkfs.ext4 begins"))?, number(&journal("remember that EC2 confirmed"))?);
    let after = |then: u64| (then as f64 - event as f64) / 1000.0;
    crate::progress::say(format!(
        "  after the kernel's event: mkfs begins {:.0} ms, EC2 has confirmed the volume {:.0} ms",
        after(mkfs),
        after(confirmed)
    ));
    ensure!(mkfs < confirmed, "mkfs waited for EC2");
    // What is waited for is the event: anything that asks in turns would be above this now and then.
    ensure!(after(mkfs) < 1000.0, "mkfs began {:.0} ms after the kernel's event", after(mkfs));
    Ok(())
}

fn ec2_calls(stage: &Stage) -> Result<usize> {
    Ok(stage.cloud.calls()?.iter().filter(|call| call.service == "ec2").count())
}

pub(super) fn foreign_disk(stage: &mut Stage) -> Result<()> {
    host::await_signals(stage)?;
    // The foreign disk comes first, blank and attached under another name: it gets the name that a
    // script would format.
    let foreign = Volume::new("vol-0fffffffffffffff0", true);
    let path = stage.attach(&foreign, "/dev/sdg")?;
    stage.guest()?.until("test -b /dev/nvme0n1", Duration::from_secs(10))?;
    let before = disk::hash(&path)?;
    stage.attach(&host::volume(), host::DEVICE)?;
    host::provision(stage.guest()?, RUN)?;
    host::expect_ready(stage)?;
    let guest = stage.guest()?;
    let serial = guest.sh("cat /sys/block/nvme0n1/device/serial")?;
    ensure!(serial.trim() == foreign.serial(), "the foreign disk is not the first: {serial}");
    guest.sh("sync")?;
    ensure!(disk::hash(&path)? == before, "the foreign disk was written to");
    Ok(())
}

/// What a container writes, without its being in any command line or log: the SHA-256 of a seed.
const SEED: &str = "a record of a patient";

pub(super) fn canary(stage: &mut Stage) -> Result<()> {
    let path = stage.attach(&host::volume(), host::DEVICE)?;
    host::provision(stage.guest()?, RUN)?;
    let guest = stage.guest()?;
    guest.sh("mkdir -p /run/busybox/bin && cp /bin/busybox /run/busybox/bin/ && \
         tar -C /run/busybox -c . | docker import - busybox:local")?;
    let write = format!(
        "docker run --network none --name writer busybox:local /bin/busybox sh -c \
         'echo -n \"{SEED}\" | /bin/busybox sha256sum | /bin/busybox cut -c 1-64 > /record; \
         for i in 1 2 3 4 5 6 7 8; do /bin/busybox cat /record; done >> /records; /bin/busybox sync' && sync"
    );
    guest.succeed(&Script::new(&write).deadline(Duration::from_secs(120)))?;
    let canary = guest.sh(&format!("echo -n \"{SEED}\" | sha256sum | cut -c 1-64"))?;
    let canary = canary.trim();
    ensure!(canary.len() == 64, "no canary: {canary:?}");
    guest.sh("sync; echo 3 >/proc/sys/vm/drop_caches")?;
    ensure!(disk::contains(&path, canary.as_bytes())?, "the canary is not on the data disk");
    ensure!(
        !disk::contains(&stage.root_disk(), canary.as_bytes())?,
        "the canary is on the root disk"
    );
    Ok(())
}
