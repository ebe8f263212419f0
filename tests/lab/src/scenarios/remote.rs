//! Docker used from another machine over SSH, as README describes it: a second instance, of the other
//! Debian release, at the other end of a cable.

use super::host;
use crate::guest::{Ended, Guest, Script};
use crate::image::{DEFAULT_RELEASE, Image, OLDEST_RELEASE};
use crate::qemu::Machine;
use crate::snapshot::{SSHD_FRAGMENT, Snapshot};
use crate::stage::Stage;
use crate::vm::Vm;
use anyhow::{Context as _, Result, ensure};
use std::fs;
use std::time::Duration;

/// The host's address, its user and its name in [`SSH_CONFIG`].
const ADDRESS: &str = "192.0.2.10";

/// What README has its readers write to `~/.ssh/config`.
const SSH_CONFIG: &str = "Host patients-1\n    HostName 192.0.2.10\n    Port 2222\n    User deploy\n    \
    ControlMaster auto\n    ControlPath ~/.ssh/%C\n    ControlPersist 10m\n";

/// What README has its readers type once.
const CONTEXT: &str = "docker context create patients-1 --docker host=ssh://patients-1";

/// Long enough for a run in emulation, with a second instance beside it.
const RUN: Duration = Duration::from_secs(600);

pub(super) fn remote(stage: &mut Stage) -> Result<()> {
    let mut other = operators_machine(stage)?;
    let cable = stage.dir().join("cable");
    stage.vm()?.plug_cable(&cable, true, "52:54:00:00:00:0a")?;
    other.plug_cable(&cable, false, "52:54:00:00:00:14")?;
    address(stage.guest()?, "52:54:00:00:00:0a", ADDRESS)?;
    let operator = &mut other.guest;
    address(operator, "52:54:00:00:00:14", "192.0.2.20")?;

    // A user without a password who may use Docker, and whose key is the operator's.
    operator.sh(
        "mkdir -p -m 0700 /root/.ssh && ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519",
    )?;
    let key = operator.sh("cat /root/.ssh/id_ed25519.pub")?;
    let host = stage.guest()?;
    host.sh(&format!("rm {SSHD_FRAGMENT} && useradd -m -G docker deploy"))?;
    host.sh(&format!(
        "cd ~deploy && install -d -m 0700 -o deploy -g deploy .ssh && echo '{}' > .ssh/authorized_keys",
        key.trim()
    ))?;
    let own = host.sh("cut -d ' ' -f 1-2 /etc/ssh/ssh_host_ed25519_key.pub")?;
    let known = format!("{ADDRESS} {own}[{ADDRESS}]:2222 {own}");
    operator.write("/root/.ssh/known_hosts", known.as_bytes())?;
    operator.sh(&format!("ssh -o BatchMode=yes deploy@{ADDRESS} true"))?;

    // Without the volume sshd is moved, and Docker is down.
    stage.guest()?.sh("systemctl start --no-block hostagent.service")?;
    for control in ["sshd-hardening", "boot-order"] {
        let fields = format!("HOSTAGENT_CONTROL={control} HOSTAGENT_VERDICT=pass");
        let passed = format!("journalctl -b -o cat {fields} | grep -q .");
        stage.guest()?.until(&passed, RUN)?;
    }
    let (there, before) =
        (format!("-H ssh://deploy@{ADDRESS}:2222"), format!("-H ssh://deploy@{ADDRESS}:22"));
    let logged_in =
        operator.sh(&format!("ssh -o BatchMode=yes -p 2222 deploy@{ADDRESS} id -nG"))?;
    ensure!(logged_in.trim() == "deploy docker", "{logged_in:?}");
    let early = docker(operator, &format!("{there} info"))?;
    ensure!(early.status != 0 && !says(&early, "Server Version"), "{early:?}");

    stage.attach(&host::volume(), host::DEVICE)?;
    host::settled(stage.guest()?, RUN)?;
    host::expect_ready(stage)?;
    let info = "info -f '{{.Name}} {{.DockerRootDir}} {{.ServerVersion}}'";
    let here = docker(stage.guest()?, info)?;
    let seen = docker(operator, &format!("{there} {info}"))?;
    ensure!(seen.status == 0 && seen.stdout == here.stdout, "{seen:?}, and not {here:?}");
    let refused = docker(operator, &format!("{before} info"))?;
    ensure!(refused.status != 0 && says(&refused, "Connection refused"), "{refused:?}");
    // Nobody gets in without the key, and nobody from elsewhere to Docker itself.
    let keyless =
        format!("ssh -o BatchMode=yes -o IdentityFile=none -p 2222 deploy@{ADDRESS} true");
    let keyless = operator.run(&Script::new(&keyless))?;
    ensure!(keyless.stderr.contains("Permission denied (publickey)"), "{keyless:?}");
    let plain = docker(operator, &format!("-H tcp://{ADDRESS}:2375 {info}"))?;
    ensure!(plain.status != 0, "Docker answers without SSH: {plain:?}");

    // By the name that README gives it: an image is sent there, and a container runs.
    operator.write("/root/.ssh/config", SSH_CONFIG.as_bytes())?;
    operator.sh(&format!("export HOME=/root; chmod 0600 /root/.ssh/config; {CONTEXT}"))?;
    operator.sh("mkdir -p /run/busybox/bin && cp /bin/busybox /run/busybox/bin/")?;
    operator.succeed(
        &Script::new(
            "export HOME=/root; tar -C /run/busybox -c . | \
             docker --context patients-1 import - busybox:local && \
             docker --context patients-1 run -d --network none --name remote busybox:local \
             /bin/busybox sleep 1000000",
        )
        .deadline(Duration::from_secs(120)),
    )?;
    stage.guest()?.sh("docker inspect -f '{{.State.Running}}' remote | grep -q true")?;
    host::expect_ready(stage)
}

/// The machine of somebody who uses Docker elsewhere: a Docker client and ssh, nothing of ours.
fn operators_machine(stage: &Stage) -> Result<Vm> {
    let release = match stage.props.image.release() {
        OLDEST_RELEASE => DEFAULT_RELEASE,
        _ => OLDEST_RELEASE,
    };
    let image = Image::of(release)?;
    let snapshot = Snapshot::booted(&image)?;
    let dir = stage.dir().join("operator");
    fs::create_dir(&dir).with_context(|| format!("creating {}", dir.display()))?;
    let disk = dir.join("root.qcow2");
    snapshot.copy_to(&disk)?;
    Vm::start(&Machine {
        snapshot: Some(snapshot.name),
        ..Machine::new(&image, &disk, &dir, stage.cloud.ports())
    })
}

/// Gives the card with a hardware address an address.
fn address(guest: &mut Guest, hardware: &str, address: &str) -> Result<()> {
    let name = format!("ip -o link | grep '{hardware}' | cut -d ' ' -f 2 | tr -d :");
    let set = format!(
        "card=$({name}) && test -n \"$card\" && ip link set \"$card\" up && \
         ip address replace {address}/24 dev \"$card\""
    );
    guest.until(&set, Duration::from_secs(20)).map(drop)
}

/// Runs the Docker client.
fn docker(guest: &mut Guest, arguments: &str) -> Result<Ended> {
    let text = format!("docker {arguments}");
    guest.run(&Script::new(&text).env("HOME", "/root").deadline(Duration::from_secs(90)))
}

/// The client says what the server side of SSH said on either stream.
fn says(ended: &Ended, words: &str) -> bool {
    format!("{}{}", ended.stdout, ended.stderr).contains(words)
}

#[cfg(test)]
mod tests {
    #[test]
    fn readme_shows_what_is_tested() {
        let readme = include_str!("../../../../README.md");
        assert!(readme.contains(&format!("```\n{}```\n", super::SSH_CONFIG)));
        assert!(readme.contains(super::CONTEXT));
    }
}
