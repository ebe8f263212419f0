//! What containers hold in memory and what they say does not come to rest on the root disk: swap,
//! core dumps, and the journal and `/tmp` of a volume that is not encrypted.

use super::host;
use crate::cloud::Volume;
use crate::disk;
use crate::guest::{Guest, Script};
use crate::qemu::ROOT_SERIAL;
use crate::stage::Stage;
use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use std::time::Duration;

/// Long enough for a run in emulation.
const RUN: Duration = Duration::from_secs(300);

/// Prints a canary: the SHA-256 of a text for this phase of a scenario, which stands in no file and
/// no command line, and who says it.
const SAY: &str = "echo $(echo -n \"the record of patient $1\" | /bin/busybox sha256sum | \
    /bin/busybox cut -c 1-64)-$2\n";

/// Crashes with a canary in memory.
const CRASH: &str = "text=$(/bin/busybox sh ${0%/*}/say $1 $2)\nulimit -c unlimited\ncd /\n\
    kill -SEGV $$\n";

/// Puts both where the host has them in memory, as `/run/busybox/say` and `/run/busybox/crash`.
fn prepare(guest: &mut Guest) -> Result<()> {
    guest.sh("mkdir -p /run/busybox/bin && cp /bin/busybox /run/busybox/bin/")?;
    guest.write("/run/busybox/say", SAY.as_bytes())?;
    guest.write("/run/busybox/crash", CRASH.as_bytes())
}

/// An image to run containers from, with the same in its root.
const IMPORT: &str = "tar -C /run/busybox -c . | docker import - busybox:local";

/// Runs a command in a container.
fn contained(guest: &mut Guest, options: &str, command: &str) -> Result<()> {
    let run = format!("docker run --network none {options} busybox:local /bin/busybox {command}");
    guest.succeed(&Script::new(&run).deadline(Duration::from_secs(120))).map(drop)
}

/// What all canaries of a phase have in common.
fn canary(guest: &mut Guest, phase: &str) -> Result<String> {
    let text = guest.sh(&format!("busybox sh /run/busybox/say {phase} x"))?;
    let text = text.trim().trim_end_matches("-x");
    ensure!(text.len() == 64, "no canary: {text:?}");
    Ok(text.to_owned())
}

/// Whether a text is on the root disk, looked at from outside.
fn on_root_disk(stage: &mut Stage, text: &str) -> Result<bool> {
    stage.guest()?.sh("journalctl --sync; sync; echo 3 >/proc/sys/vm/drop_caches; sync")?;
    disk::contains(&stage.root_disk(), text.as_bytes())
}

/// Expects `verify` to fail, with this control and a sentence that has these words.
fn expect_fail(guest: &mut Guest, control: &str, words: &str) -> Result<()> {
    let (status, report) = host::verify(guest)?;
    let entry = report["controls"].as_array().into_iter().flatten().find(|c| c["id"] == control);
    let observed = entry.and_then(|c| c["verdict"]["observed"].as_str()).unwrap_or_default();
    let fails = host::word(&report, control) == "fail" && observed.contains(words);
    ensure!(status == 1 && fails, "{control} says {observed:?}, not {words:?}: {report:#}");
    Ok(())
}

pub(super) fn swap(stage: &mut Stage) -> Result<()> {
    host::await_signals(stage)?;
    stage.attach(&host::volume(), host::DEVICE)?;
    let guest = stage.guest()?;
    guest.sh("fallocate -l 64M /swapfile && chmod 600 /swapfile && mkswap -q /swapfile && \
         echo '/swapfile none swap sw 0 0' >> /etc/fstab && systemctl daemon-reload && \
         systemctl start swapfile.swap")?;
    let fstab = guest.sh("grep -q swapfile /proc/swaps && cat /etc/fstab")?;
    expect_fail(guest, "swap", "/swapfile on vol-0aaaaaaaaaaaaaaa0")?;

    host::provision(guest, RUN)?;
    host::expect_ready(stage)?;
    let guest = stage.guest()?;
    guest.sh("test $(wc -l </proc/swaps) = 1").context("swap is still on")?;
    // The next boot: systemd reads fstab, and starts what swap.target wants.
    guest
        .sh("systemctl daemon-reload; systemctl start swap.target; test $(wc -l </proc/swaps) = 1")
        .context("swap came back")?;
    let after = guest.sh("cat /etc/fstab")?;
    ensure!(after == fstab, "the operator's fstab was changed: {after}");
    let plan = host::hostagent(guest, "plan")?;
    ensure!(plan.stdout.ends_with("; 0 steps to do\n"), "{plan:?}");

    // On the data volume swap is fine, and what is barred does not keep it from starting.
    guest.sh("fallocate -l 16M /data/swapfile && chmod 600 /data/swapfile && \
         mkswap -q /data/swapfile && echo '/data/swapfile none swap sw 0 0' >> /etc/fstab && \
         systemctl daemon-reload && systemctl restart swap.target && \
         grep -q /data/swapfile /proc/swaps && ! grep -q '^/swapfile' /proc/swaps")?;
    host::expect_ready(stage)
}

pub(super) fn core_dumps(stage: &mut Stage) -> Result<()> {
    host::await_signals(stage)?;
    stage.attach(&host::volume(), host::DEVICE)?;
    let guest = stage.guest()?;
    prepare(guest)?;
    // A host that keeps dumps, now and at every boot.
    guest.sh("mkdir -p /var/crash && echo 'kernel.core_pattern=/var/crash/core.%p' \
         > /etc/sysctl.d/50-crash.conf && /usr/lib/systemd/systemd-sysctl")?;
    let crash = "! busybox sh /run/busybox/crash";
    guest.sh(&format!("{crash} before host"))?;
    let before = canary(guest, "before")?;
    // The lab can see what it is looking for.
    ensure!(on_root_disk(stage, &before)?, "a core dump is not found on the root disk");
    let guest = stage.guest()?;
    expect_fail(guest, "core-dumps", "/var/crash/core.%p")?;

    host::provision(guest, RUN)?;
    host::expect_ready(stage)?;
    let guest = stage.guest()?;
    guest.sh(IMPORT)?;
    // A shell in a shell: a container's first process is not ended by a signal of its own.
    contained(
        guest,
        "--ulimit core=-1",
        "sh -c '/bin/busybox sh /crash after container; test $? = 139'",
    )?;
    guest.sh(&format!("{crash} after host"))?;
    // What a boot does with the settings on disk changes nothing.
    guest
        .sh("/usr/lib/systemd/systemd-sysctl; grep -qx '|/bin/false' /proc/sys/kernel/core_pattern")
        .context("the next boot would keep core dumps again")?;
    guest.sh(&format!("{crash} after later"))?;
    let after = canary(guest, "after")?;
    ensure!(!on_root_disk(stage, &after)?, "the memory of a crash is on the root disk");
    stage.guest()?.sh("test $(ls /var/crash | wc -l) = 1 && ! ls /core* 2>/dev/null").map(drop)
}

pub(super) fn root_plain(stage: &mut Stage) -> Result<()> {
    host::await_signals(stage)?;
    let root = ROOT_SERIAL.replacen("vol", "vol-", 1);
    stage.cloud.change_volume(&root, &json!({ "encrypted": false }))?;
    let data = stage.attach(&host::volume(), host::DEVICE)?;
    let guest = stage.guest()?;
    prepare(guest)?;
    // As on an older Debian: a persistent journal, a syslog daemon, and /tmp on the root disk.
    guest.sh("rm /etc/systemd/journald.conf.d/lab.conf && mkdir -p /var/log/journal && \
         rm /usr/lib/systemd/system/tmp.mount /usr/lib/systemd/system/local-fs.target.wants/tmp.mount && \
         printf '[Service]\\nExecStart=/bin/sleep infinity\\n' > /etc/systemd/system/syslog.service && \
         systemctl daemon-reload && systemctl start syslog.service && umount -l /tmp && \
         systemctl restart systemd-journald && journalctl --flush")?;
    let say = "busybox sh /run/busybox/say";
    guest.sh(&format!("{say} before journal | logger; {say} before tmp > /tmp/before"))?;
    let before = canary(guest, "before")?;
    // By a datagram: of a stream whose writer is gone (systemd-cat), journald loses a line now and then.
    let look = format!("journalctl -b -o cat | grep -qx {before}-journal");
    guest.until(&look, Duration::from_secs(20))?;
    for who in ["journal", "tmp"] {
        let found = on_root_disk(stage, &format!("{before}-{who}"))?;
        ensure!(found, "the {who} of before is not found on the root disk");
    }

    // By default such a host is refused.
    host::provision(stage.guest()?, RUN)?;
    host::expect_not_ready(stage, &[("root-volume", "fail"), ("docker-storage", "fail")])?;
    host::expect_signals(stage, &["FAILURE"], &["ABANDON"])?;

    let guest = stage.guest()?;
    host::configure(guest, "root", "[root]\nencryption = \"warn\"\n")?;
    expect_fail(guest, "root-volume", "journald writes /var/log/journal/")?;
    host::provision(guest, RUN)?;
    host::expect_ready(stage)?;
    let guest = stage.guest()?;
    guest
        .sh("journalctl -b -u hostagent.service -o cat PRIORITY=4 | grep -q 'is not encrypted'")
        .context("the host does not warn of its root volume")?;
    guest.sh("test $(findmnt -n -o FSTYPE /tmp) = tmpfs && \
         systemctl show -P WantedBy tmp.mount | grep -q local-fs.target")?;
    guest.sh("ls -l /proc/$(pidof systemd-journald)/fd | grep -q /run/log/journal")?;
    // journald was restarted under the feet of its clients: they still reach it.
    guest.sh("journalctl -b -o cat | grep -q 'this host is ready'")?;

    guest.sh(IMPORT)?;
    for driver in ["json-file", "journald"] {
        let options = format!("--log-driver {driver}");
        contained(guest, &options, &format!("sh /say after {driver} >/dev/null"))?;
    }
    guest.sh(&format!("{say} after host | logger; {say} after tmp > /tmp/after"))?;
    let after = canary(guest, "after")?;
    // The container's words and the host's are in the journal, in memory.
    for who in ["journald", "host"] {
        let look = format!("journalctl -b -o cat | grep -qx {after}-{who}");
        guest.until(&look, Duration::from_secs(20))?;
    }
    ensure!(!on_root_disk(stage, &after)?, "what was said is on the root disk");
    let logged = format!("{after}-json-file");
    ensure!(disk::contains(&data, logged.as_bytes())?, "the log is not on the data disk");

    // "allow" demands the same, and does not warn.
    let guest = stage.guest()?;
    host::configure(guest, "root", "[root]\nencryption = \"allow\"\n")?;
    let verify = host::hostagent(guest, "verify")?;
    ensure!(verify.status == 0 && !verify.stdout.contains("WARNING"), "{verify:?}");
    // A log driver that leads elsewhere on this host is not hostagent's to change.
    guest.sh("echo '{\"log-driver\": \"syslog\", \"log-opts\": {\"syslog-address\": \"udp://127.0.0.1:514\"}}' \
         > /etc/docker/daemon.json")?;
    expect_fail(guest, "root-volume", "udp://127.0.0.1:514")
}

pub(super) fn logs_plain(stage: &mut Stage) -> Result<()> {
    host::await_signals(stage)?;
    // The root volume is encrypted; /var/log is on a volume of its own, which is not.
    let logs = Volume::new("vol-0cccccccccccccccc", false);
    stage.attach(&logs, "/dev/sdg")?;
    let guest = stage.guest()?;
    guest.until("test -b /dev/nvme0n1", Duration::from_secs(10))?;
    guest.sh("mkfs.ext4 -q /dev/nvme0n1 && mount /dev/nvme0n1 /var/log && \
         rm /etc/systemd/journald.conf.d/lab.conf && mkdir /var/log/journal && \
         systemctl restart systemd-journald && journalctl --flush")?;
    stage.attach(&host::volume(), host::DEVICE)?;
    host::provision(stage.guest()?, RUN)?;
    host::expect_not_ready(stage, &[("root-volume", "fail"), ("docker-storage", "fail")])?;
    host::expect_signals(stage, &["FAILURE"], &["ABANDON"])?;
    let guest = stage.guest()?;
    let said = format!("/var/log is on {}, which is not encrypted", logs.id);
    expect_fail(guest, "root-volume", &said)?;

    host::configure(guest, "root", "[root]\nencryption = \"warn\"\n")?;
    expect_fail(guest, "root-volume", "journald writes /var/log/journal/")?;
    host::provision(guest, RUN)?;
    host::expect_ready(stage)?;
    let guest = stage.guest()?;
    guest.sh("ls -l /proc/$(pidof systemd-journald)/fd | grep -q /run/log/journal")?;
    guest
        .sh(&format!("journalctl -b -u hostagent.service -o cat PRIORITY=4 | grep -q '{said}'"))
        .context("the host does not warn of the volume")
        .map(drop)
}
