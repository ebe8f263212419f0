//! A host that must not become ready: what was seen is said, nothing that is in question is touched,
//! Docker is down, whoever waits is told, and sshd answers.

use super::host;
use crate::cloud::{Fault, Volume};
use crate::disk;
use crate::stage::Stage;
use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use std::path::Path;
use std::time::Duration;

/// Long enough for a run in emulation.
const RUN: Duration = Duration::from_secs(300);

/// Provisions, and expects a refusal with these verdicts and FAILURE and ABANDON.
fn refuses(stage: &mut Stage, verdicts: &[(&str, &str)]) -> Result<()> {
    host::provision(stage.guest()?, RUN)?;
    host::expect_not_ready(stage, verdicts)?;
    host::expect_signals(stage, &["FAILURE"], &["ABANDON"])
}

fn expect_blank(stage: &mut Stage, path: &Path) -> Result<()> {
    stage.guest()?.sh("sync")?;
    let written = std::fs::metadata(path).map(|m| std::os::unix::fs::MetadataExt::blocks(&m))?;
    ensure!(written == 0, "{} was written to", path.display());
    Ok(())
}

pub(super) fn unencrypted(stage: &mut Stage) -> Result<()> {
    host::await_signals(stage)?;
    let path = stage.attach(&Volume::new(host::VOLUME, false), host::DEVICE)?;
    refuses(
        stage,
        &[("data-volume", "fail"), ("data-mount", "unknown"), ("docker-storage", "unknown")],
    )?;
    expect_blank(stage, &path)?;
    // sshd was moved all the same: somebody has to look at the host.
    host::expect_sshd(stage.guest()?, 2222, 22)
}

pub(super) fn other_encrypted(stage: &mut Stage) -> Result<()> {
    host::await_signals(stage)?;
    let other = stage.attach(&Volume::new("vol-0fffffffffffffff0", true), "/dev/sdg")?;
    let path = stage.attach(&Volume::new(host::VOLUME, false), host::DEVICE)?;
    refuses(stage, &[("data-volume", "fail"), ("data-filesystem", "unknown")])?;
    expect_blank(stage, &path)?;
    expect_blank(stage, &other)
}

pub(super) fn shared_tenancy(stage: &mut Stage) -> Result<()> {
    host::await_signals(stage)?;
    stage.cloud.change_instance(crate::qemu::INSTANCE_ID, &json!({ "tenancy": "default" }))?;
    stage.attach(&host::volume(), host::DEVICE)?;
    refuses(stage, &[("instance-tenancy", "fail"), ("docker-storage", "fail")])
}

pub(super) fn denied(stage: &mut Stage) -> Result<()> {
    host::await_signals(stage)?;
    let path = stage.attach(&host::volume(), host::DEVICE)?;
    stage.cloud.fault(&Fault {
        service: "ec2".into(),
        kind: "error".into(),
        code: Some("UnauthorizedOperation".into()),
        ..Fault::default()
    })?;
    refuses(stage, &[("instance-tenancy", "unknown"), ("data-volume", "unknown")])?;
    expect_blank(stage, &path)
}

pub(super) fn never_attached(stage: &mut Stage) -> Result<()> {
    host::await_signals(stage)?;
    host::configure(stage.guest()?, "wait", "[volume]\nwait_seconds = 10\n")?;
    refuses(stage, &[("data-volume", "fail"), ("docker-storage", "unknown")])
}

pub(super) fn foreign_content(stage: &mut Stage) -> Result<()> {
    host::await_signals(stage)?;
    let path = stage.attach(&host::volume(), host::DEVICE)?;
    let guest = stage.guest()?;
    guest.until("test -b /dev/nvme0n1", Duration::from_secs(10))?;
    // Somebody's ext4, with its primary superblock wiped: nothing recognises it, and it is not blank.
    guest.sh("mkfs.ext4 -q /dev/nvme0n1 && wipefs -qaf /dev/nvme0n1 && dd if=/dev/zero of=/dev/nvme0n1 bs=4k count=1 conv=notrunc status=none && sync")?;
    guest.sh("! blkid -p /dev/nvme0n1").context("blkid still sees something")?;
    let before = disk::hash(&path)?;
    refuses(stage, &[("data-filesystem", "fail"), ("data-mount", "unknown")])?;
    stage.guest()?.sh("sync")?;
    ensure!(disk::hash(&path)? == before, "the disk was written to");
    Ok(())
}

pub(super) fn used_docker(stage: &mut Stage) -> Result<()> {
    host::await_signals(stage)?;
    stage.attach(&host::volume(), host::DEVICE)?;
    let guest = stage.guest()?;
    host::configure(guest, "docker", "[docker]\nmigrate = \"never\"\n")?;
    guest.sh(
        "docker volume create records && echo precious > /var/lib/docker/volumes/records/_data/r",
    )?;
    refuses(stage, &[("docker-storage", "fail")])?;
    let guest = stage.guest()?;
    guest
        .sh("grep -q precious /var/lib/docker/volumes/records/_data/r")
        .context("data is hidden or lost")
        .map(drop)
}

pub(super) fn signal_lost(stage: &mut Stage) -> Result<()> {
    host::await_signals(stage)?;
    stage.attach(&host::volume(), host::DEVICE)?;
    stage.cloud.fault(&Fault {
        service: "cloudformation".into(),
        kind: "error".into(),
        code: Some("AccessDenied".into()),
        ..Fault::default()
    })?;
    host::provision(stage.guest()?, RUN)?;
    let guest = stage.guest()?;
    guest.sh("! test -e /run/hostagent/ready").context("the marker is there")?;
    guest.sh("! systemctl is-active --quiet hostagent-ready.target").context("the target is up")?;
    guest.sh("systemctl is-failed hostagent.service").context("the run did not fail")?;
    let status = host::hostagent(guest, "status")?;
    ensure!(status.status == 1 && status.stdout.contains("AccessDenied"), "{status:?}");
    // The group was not told to continue while the stack is in doubt.
    host::expect_signals(stage, &[], &[])?;
    // When the stack can be told, the next run says it.
    stage.cloud.clear_faults()?;
    host::provision(stage.guest()?, RUN)?;
    host::expect_signals(stage, &["SUCCESS"], &["CONTINUE"])
}

pub(super) fn sshd_conflict(stage: &mut Stage) -> Result<()> {
    host::await_signals(stage)?;
    stage.attach(&host::volume(), host::DEVICE)?;
    let guest = stage.guest()?;
    guest.sh("echo 'Port 22' >> /etc/ssh/sshd_config && systemctl reload ssh.service")?;
    // sshd listens on its new port, and nobody gets there.
    guest.sh("iptables -A INPUT -p tcp --dport 2222 -j REJECT --reject-with tcp-reset")?;
    let before = guest.sh("cat /etc/ssh/sshd_config; ls /etc/ssh/sshd_config.d")?;
    refuses(stage, &[("sshd-port", "fail")])?;
    let guest = stage.guest()?;
    guest.sh("iptables -D INPUT -p tcp --dport 2222 -j REJECT --reject-with tcp-reset")?;
    host::expect_sshd(guest, 22, 2222)?;
    let after = guest.sh("cat /etc/ssh/sshd_config; ls /etc/ssh/sshd_config.d")?;
    ensure!(before == after, "sshd's configuration was not put back: {after}");
    guest.sh("journalctl -b -u hostagent.service -o cat | grep -q 'sshd does not answer on 127.0.0.1:2222'")?;
    Ok(())
}

pub(super) fn gate(stage: &mut Stage) -> Result<()> {
    // From the installation on, before anything is provisioned: Docker runs from before, and nothing
    // starts it again.
    let guest = stage.guest()?;
    guest.sh("systemctl is-enabled hostagent.service")?;
    guest
        .sh("test $(systemctl show -P ExecMainStartTimestampMonotonic hostagent.service) = 0")
        .context("the package started hostagent")?;
    guest.sh("! systemctl restart docker.service").context("docker restarted")?;
    guest.sh("! systemctl restart containerd.service").context("containerd restarted")?;
    guest.sh("! systemctl is-active docker.service && ! systemctl is-active containerd.service")?;
    guest
        .sh("systemctl restart docker.socket || true; ! timeout 20 docker ps")
        .context("the socket started Docker")?;
    guest.sh("! pgrep -x dockerd && ! pgrep -x containerd")?;
    let gate = host::hostagent(guest, "gate")?;
    ensure!(gate.status == 1 && gate.stderr.contains("has not confirmed"), "{gate:?}");
    guest.sh("systemd-analyze verify hostagent.service hostagent-ready.target docker.service containerd.service")
        .context("a unit has an error")?;
    Ok(())
}

pub(super) fn configuration(stage: &mut Stage) -> Result<()> {
    stage.attach(&host::volume(), host::DEVICE)?;
    let guest = stage.guest()?;
    let traces =
        "find / -xdev -newer /run/mark -type f -not -path '/var/log/*' -not -path '/proc/*' | sort";
    for (text, expected) in [
        ("[sshd]\nprot = 2222\n", "bad.toml:2: sshd.prot: unknown field"),
        ("[sshd]\nport = 0\n", "bad.toml:2: sshd.port: 0 is not a TCP port"),
        (
            "[volume]\nmount_point = \"/\"\n",
            "bad.toml:2: volume.mount_point: belongs to the system",
        ),
    ] {
        host::configure(guest, "bad", text)?;
        guest.sh("touch /run/mark")?;
        let ended = host::hostagent(guest, "provision")?;
        ensure!(ended.status == 78 && ended.stderr.contains(expected), "{expected}: {ended:?}");
        let written = guest.sh(traces)?;
        ensure!(written.trim().is_empty(), "a bad configuration changed the host: {written}");
        // Nor does the gate open.
        let gate = host::hostagent(guest, "gate")?;
        ensure!(gate.status == 78, "{gate:?}");
    }
    Ok(())
}

pub(super) fn one_at_a_time(stage: &mut Stage) -> Result<()> {
    let guest = stage.guest()?;
    guest.sh("mkdir -p /run/hostagent && touch /run/hostagent/lock")?;
    guest.start("flock /run/hostagent/lock sleep 100")?;
    guest.until("! flock -n /run/hostagent/lock true", Duration::from_secs(10))?;
    for command in ["provision", "verify", "plan"] {
        let ended = host::hostagent(guest, command)?;
        ensure!(ended.status == 75 && ended.stdout.is_empty(), "{command}: {ended:?}");
    }
    Ok(())
}

pub(super) fn impostor(stage: &mut Stage) -> Result<()> {
    host::await_signals(stage)?;
    stage.attach(&host::volume(), host::DEVICE)?;
    let guest = stage.guest()?;
    // Something else speaks SSH on the port that sshd is to have: its banner proves nothing.
    let server = "import socket\n\
        s = socket.create_server(('', 2222), family=socket.AF_INET6, dualstack_ipv6=True)\n\
        while True:\n    c, _ = s.accept()\n    c.sendall(b'SSH-2.0-impostor\\r\\n')\n    c.close()\n";
    guest.write("/run/impostor.py", server.as_bytes())?;
    guest.sh("systemd-run --quiet python3 /run/impostor.py")?;
    guest.until("ss -ltn | grep -q ':2222 '", Duration::from_secs(20))?;
    refuses(stage, &[("sshd-port", "fail"), ("docker-storage", "fail")])?;
    let guest = stage.guest()?;
    guest
        .sh("systemctl is-active ssh.service && ss -ltnp | grep ':22 ' | grep -q sshd")
        .context("sshd is gone")?;
    guest.sh("! test -e /etc/ssh/sshd_config.d/10-hostagent.conf").map(drop)
}

pub(super) fn data_root(stage: &mut Stage) -> Result<()> {
    host::await_signals(stage)?;
    stage.attach(&host::volume(), host::DEVICE)?;
    let guest = stage.guest()?;
    guest.sh(
        "mkdir -p /etc/docker && echo '{\"data-root\": \"/srv/docker\"}' > /etc/docker/daemon.json",
    )?;
    refuses(stage, &[("docker-storage", "fail")])?;
    let guest = stage.guest()?;
    let gate = host::hostagent(guest, "gate")?;
    ensure!(gate.status == 1 && !gate.stderr.is_empty(), "{gate:?}");
    guest.sh("! test -e /srv/docker").context("Docker wrote to the root disk")?;
    // The operator's file is left as it is.
    guest.sh("grep -q /srv/docker /etc/docker/daemon.json")?;

    elsewhere(stage)?;
    by_flag(stage)?;
    imported(stage)?;

    // A disk mounted inside Docker's storage: what is written there leaves the volume.
    let guest = stage.guest()?;
    guest.sh(
        "systemctl stop docker.socket docker.service && mkdir -p /srv/plain /var/lib/docker/containers && \
         mount --bind /srv/plain /var/lib/docker/containers && ! systemctl start docker.service",
    )
    .context("Docker started on a stray mount")?;
    let (status, report) = host::verify(guest)?;
    // The socket that the refused start brought along would start Docker, if the gate let it.
    ensure!(status == 1 && host::word(&report, "boot-order") == "fail", "{report:#}");
    // The next run takes readiness back.
    host::provision(guest, RUN)?;
    guest.sh("! test -e /run/hostagent/ready && ! systemctl is-active --quiet hostagent-ready.target")
        .context("the host is still called ready")
        .map(drop)
}

/// A flag leads off the volume, and Docker is down: the gate cannot see it, and nobody starts Docker.
fn by_flag(stage: &mut Stage) -> Result<()> {
    let guest = stage.guest()?;
    let drop_in = "/etc/systemd/system/docker.service.d/root.conf";
    guest.sh(&format!(
        "systemctl stop docker.socket docker.service && mkdir -p $(dirname {drop_in}) && \
         command=$(sed -n 's/^ExecStart=//p' /usr/lib/systemd/system/docker.service) && \
         printf '[Service]\\nExecStart=\\nExecStart=%s --data-root /srv/docker\\n' \"$command\" > {drop_in} && \
         systemctl daemon-reload && hostagent gate"
    ))?;
    let (status, report) = host::verify(guest)?;
    ensure!(status == 1 && host::word(&report, "docker-storage") == "fail", "{report:#}");
    for _ in 0..2 {
        host::provision(guest, RUN)?;
        guest.sh("! systemctl is-active docker.service && ! test -e /run/hostagent/ready")?;
        guest.sh("! test -e /srv/docker").context("Docker wrote to the root disk")?;
    }
    guest
        .sh("journalctl -b -u hostagent.service -o cat | grep -q 'not started.*--data-root /srv/docker'")
        .context("not said why")?;
    guest.sh(&format!("rm {drop_in} && systemctl daemon-reload"))?;
    host::provision(guest, RUN)?;
    host::expect_ready(stage)
}

/// containerd's file imports one that leads off the volume: the gate is closed.
fn imported(stage: &mut Stage) -> Result<()> {
    let guest = stage.guest()?;
    guest
        .sh("cd /etc/containerd && cp -a config.toml /root/ && mkdir -p conf.d && \
         sed -i '1i imports = [\"/etc/containerd/conf.d/*.toml\"]' config.toml && hostagent gate")
        .context("an import that matches nothing")?;
    guest
        .sh("systemctl stop docker.socket docker.service containerd.service && \
         printf 'version = 2\\nroot = \"/srv/containerd\"\\n' > /etc/containerd/conf.d/x.toml && \
         ! hostagent gate && ! systemctl start containerd.service && ! test -e /srv/containerd")
        .context("containerd started off the volume")?;
    guest.sh("rm -r /etc/containerd/conf.d && mv /root/config.toml /etc/containerd/")?;
    host::provision(guest, RUN)?;
    host::expect_ready(stage)
}

/// Docker's root directory is elsewhere on the volume, and then where it was again.
pub(super) fn elsewhere(stage: &mut Stage) -> Result<()> {
    let guest = stage.guest()?;
    // That is on the volume, also through a link, and before it is there.
    guest.sh("ln -s /data /srv/link && \
         echo '{\"data-root\": \"/srv/link/mine/docker\"}' > /etc/docker/daemon.json")?;
    host::provision(stage.guest()?, RUN)?;
    host::expect_ready(stage)?;
    let guest = stage.guest()?;
    guest.sh("test -d /data/mine/docker/overlay2")?;
    // As it was told at the first start, and without links later.
    let root = guest.sh("readlink -f $(docker info -f '{{.DockerRootDir}}')")?;
    ensure!(root.trim() == "/data/mine/docker", "Docker's root directory is {root}");
    // Where the link leads is what counts at the next start.
    guest.sh("ln -sfn /srv/other /srv/link && mkdir /srv/other && ! hostagent gate")?;
    guest.sh("! systemctl restart docker.service && ! test -e /srv/other/mine")?;

    guest.sh("rm /etc/docker/daemon.json")?;
    host::provision(stage.guest()?, RUN)?;
    host::expect_ready(stage)
}

pub(super) fn snap(stage: &mut Stage) -> Result<()> {
    host::await_signals(stage)?;
    stage.attach(&host::volume(), host::DEVICE)?;
    let guest = stage.guest()?;
    // As far as anybody can see, for no snap can be had here.
    let unit = "/etc/systemd/system/snap.docker.dockerd.service";
    guest.sh(&format!(
        "printf '[Service]\\nExecStart=/bin/sleep infinity\\n' > {unit} && systemctl daemon-reload"
    ))?;
    refuses(stage, &[("docker-storage", "fail")])?;
    let guest = stage.guest()?;
    guest
        .sh("journalctl -b -u hostagent.service -o cat | grep -q 'refused: Docker is a snap (snap.docker'")
        .context("not said why")?;
    guest.sh(&format!("rm {unit} && systemctl daemon-reload && mkdir -p /snap/docker/current"))?;
    let (_, report) = host::verify(guest)?;
    ensure!(report.to_string().contains("installed as a snap: /snap/docker"), "{report:#}");
    guest.sh("rm -r /snap")?;
    host::provision(guest, RUN)?;
    host::expect_ready(stage)
}

pub(super) fn silent_metadata(stage: &mut Stage) -> Result<()> {
    stage.attach(&host::volume(), host::DEVICE)?;
    stage.cloud.fault(&Fault {
        service: "imds".into(),
        action: Some("latest/api/token".into()),
        kind: "hang".into(),
        ..Fault::default()
    })?;
    let guest = stage.guest()?;
    let begun = std::time::Instant::now();
    let (status, report) = host::verify(guest)?;
    let took = begun.elapsed();
    // Docker runs on the root disk and sshd on 22: that is known without AWS, and fails.
    ensure!(status == 1, "verify ended with {status}: {report:#}");
    for control in ["instance-tenancy", "data-volume", "data-filesystem", "docker-storage"] {
        ensure!(host::word(&report, control) == "unknown", "{control}: {report:#}");
    }
    ensure!(took < Duration::from_secs(20), "verify took {took:?}");
    Ok(())
}
