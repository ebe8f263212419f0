//! sshd moves to its port without locking anybody out: by `ssh.service` and by `ssh.socket`, with what
//! the operator's files say of ports and addresses, with a session open, and undone when it does not
//! answer.
//!
//! Debian ships `ssh.socket` disabled and without a generator. What Ubuntu has since 24.04 is made
//! here: its socket unit, and a shell script in the place of `sshd-socket-generator`, which writes
//! what that writes (see [`GENERATOR`]).

use super::host;
use crate::guest::{Guest, Script};
use crate::snapshot::SSHD_FRAGMENT;
use crate::stage::Stage;
use anyhow::{Context as _, Result, ensure};
use std::time::Duration;

/// Everything of the configuration that a change of the port could touch, owners and modes included.
const CONFIGURATION: &str = "cd /etc && find ssh/sshd_config* systemd/system/ssh.socket.d \
    -printf '%p %M %U %G\\n' 2>/dev/null | sort; cat ssh/sshd_config ssh/sshd_config.d/*; true";

/// The instance, on which nothing but these scenarios runs hostagent.
fn prepared<'a>(stage: &'a mut Stage) -> Result<&'a mut Guest> {
    let guest = stage.guest()?;
    guest.sh("systemctl disable hostagent.service")?;
    Ok(guest)
}

/// Only this control: what the rest of the host is in makes no difference to sshd.
fn move_sshd(guest: &mut Guest) -> Result<crate::guest::Ended> {
    host::hostagent(guest, "provision --only sshd-port")
}

/// Expects sshd on 2222 alone, and hostagent to say so and to have nothing left to do.
fn expect_moved(guest: &mut Guest) -> Result<()> {
    host::expect_sshd(guest, 2222, 22)?;
    let verified = host::hostagent(guest, "verify --only sshd-port")?;
    ensure!(verified.status == 0, "{verified:?}");
    let again = host::hostagent(guest, "plan --only sshd-port")?;
    ensure!(again.status == 0 && !again.stdout.contains("move sshd"), "{again:?}");
    Ok(())
}

/// Gives sshd's sockets to `ssh.socket`, as Ubuntu 22.10 and later have it.
fn by_socket(guest: &mut Guest) -> Result<()> {
    guest.sh("systemctl disable --now ssh.service && systemctl enable --now ssh.socket")?;
    host::expect_sshd(guest, 22, 2222)
}

/// Debian's own socket, which says 22 and has no generator: also after a boot, and with a session
/// that is open all the time.
pub(super) fn socket(stage: &mut Stage) -> Result<()> {
    let guest = prepared(stage)?;
    by_socket(guest)?;
    guest.sh("systemctl stop ssh.service && ! systemctl is-active ssh.service")?;
    let session = Session::open(guest)?;
    let plan = host::hostagent(guest, "plan --only sshd-port")?;
    ensure!(plan.stdout.contains("move sshd to port 2222"), "{plan:?}");
    host::expect_sshd(guest, 22, 2222).context("plan moved it")?;
    // What cannot be completed is undone: something that is read after ours says otherwise.
    guest.sh(
        "mkdir -p /etc/systemd/system/ssh.socket.d && printf '[Socket]\\nListenStream=2022\\n' \
         > /etc/systemd/system/ssh.socket.d/zzz-more.conf && systemctl daemon-reload",
    )?;
    let before = guest.sh(CONFIGURATION)?;
    let undone = move_sshd(guest)?;
    ensure!(undone.status == 1 && undone.stderr.contains("is as it was before"), "{undone:?}");
    ensure!(guest.sh(CONFIGURATION)? == before, "something of the change is left");
    host::expect_sshd(guest, 22, 2222)?;
    session.expect_open(guest)?;
    guest.sh("rm /etc/systemd/system/ssh.socket.d/zzz-more.conf && systemctl daemon-reload")?;

    let moved = move_sshd(guest)?;
    ensure!(moved.status == 0, "{moved:?}");
    session.expect_open(guest)?;
    expect_moved(guest)?;
    guest.sh("test -e /etc/systemd/system/ssh.socket.d/zz-hostagent.conf")?;
    other_ports(guest)?;

    stage.power_cycle_with(crate::qemu::INSTANCE_ID, &[])?;
    let guest = stage.guest()?;
    guest.until("systemctl is-active ssh.socket", Duration::from_secs(60))?;
    // PID 1 listens, and nobody has connected yet.
    guest.sh("ss -ltnp | grep ':2222 ' | grep -q systemd && ! ss -ltn | grep -q ':22 '")?;
    expect_moved(guest)?;

    // Ubuntu 22.04's, with an sshd for each connection: refused, and left as it is.
    guest.sh("systemctl stop ssh.socket ssh.service")?;
    guest.write("/etc/systemd/system/ssh.socket", ACCEPTING_SOCKET.as_bytes())?;
    guest.write("/etc/systemd/system/ssh@.service", ACCEPTED.as_bytes())?;
    guest.sh("systemctl daemon-reload && systemctl start ssh.socket")?;
    host::expect_sshd(guest, 2222, 22)?;
    let verified = host::hostagent(guest, "verify --only sshd-port")?;
    ensure!(verified.status == 1 && verified.stdout.contains("Accept=yes"), "{verified:?}");
    let refused = move_sshd(guest)?;
    ensure!(
        refused.status == 1 && refused.stderr.contains("disable --now ssh.socket"),
        "{refused:?}"
    );
    host::expect_sshd(guest, 2222, 22)
}

/// Another port that is configured, 22 among them, and back.
fn other_ports(guest: &mut Guest) -> Result<()> {
    let mut old = 2222;
    for port in [22, 2022, 2222] {
        host::configure(guest, "port", &format!("[sshd]\nport = {port}\n"))?;
        let moved = move_sshd(guest)?;
        ensure!(moved.status == 0, "to {port}: {moved:?}");
        host::expect_sshd(guest, port, old)?;
        let verified = host::hostagent(guest, "verify --only sshd-port")?;
        ensure!(verified.status == 0, "on {port}: {verified:?}");
        old = port;
    }
    guest.sh("rm /etc/hostagent/conf.d/port.toml").map(drop)
}

/// `ssh.socket` of Ubuntu 22.04, which is not enabled there, and the service for each connection.
const ACCEPTING_SOCKET: &str = "[Unit]\nDescription=OpenBSD Secure Shell server socket\n\
    Before=ssh.service\nConflicts=ssh.service\nConditionPathExists=!/etc/ssh/sshd_not_to_be_run\n\
    [Socket]\nListenStream=22\nAccept=yes\n[Install]\nWantedBy=sockets.target\n";
const ACCEPTED: &str = "[Unit]\nDescription=OpenBSD Secure Shell server per-connection daemon\n\
    [Service]\nEnvironmentFile=-/etc/default/ssh\nExecStart=-/usr/sbin/sshd -i $SSHD_OPTS\n\
    StandardInput=socket\nRuntimeDirectory=sshd\nRuntimeDirectoryMode=0755\n";

/// What `sshd-socket-generator` of Ubuntu 24.04 (openssh 1:9.6p1-3ubuntu13.20) and 26.04 does: the
/// addresses of sshd's configuration, if they are not the default ones, become the socket's. Like it,
/// this looks at the configuration alone; unlike it, it asks sshd what that is.
const GENERATOR: &str = r#"#!/bin/sh
set -e
mkdir -p /run/sshd
listen=$(/usr/sbin/sshd -T | sed -n 's/^listenaddress //p' | sort -u)
[ "$listen" != "$(printf '0.0.0.0:22\n[::]:22')" ] || exit 0
mkdir -p "$1/ssh.socket.d"
{
    printf '# Automatically generated by sshd-socket-generator\n\n[Socket]\nListenStream=\n'
    printf 'ListenStream=%s\n' $listen
} > "$1/ssh.socket.d/addresses.conf"
"#;

/// Ubuntu's `ssh.socket` of the same version.
const UBUNTU_SOCKET: &str = "[Unit]\nDescription=OpenBSD Secure Shell server socket\n\
    Before=sockets.target ssh.service\nConditionPathExists=!/etc/ssh/sshd_not_to_be_run\n\
    [Socket]\nListenStream=0.0.0.0:22\nListenStream=[::]:22\nBindIPv6Only=ipv6-only\nAccept=no\n\
    FreeBind=yes\n[Install]\nWantedBy=sockets.target\nRequiredBy=ssh.service\n";

/// A socket that a generator configures.
pub(super) fn generator(stage: &mut Stage) -> Result<()> {
    let guest = prepared(stage)?;
    guest.write("/etc/systemd/system/ssh.socket", UBUNTU_SOCKET.as_bytes())?;
    let generator = "/usr/lib/systemd/system-generators/sshd-socket-generator";
    guest.write(generator, GENERATOR.as_bytes())?;
    guest.sh(&format!("chmod 0755 {generator} && systemctl daemon-reload"))?;
    by_socket(guest)?;
    let session = Session::open(guest)?;
    let moved = move_sshd(guest)?;
    ensure!(moved.status == 0, "{moved:?}");
    session.expect_open(guest)?;
    expect_moved(guest)?;
    let hardened = host::hostagent(guest, "provision --only sshd-hardening")?;
    ensure!(hardened.status == 0, "{hardened:?}");
    session.expect_open(guest)?;
    host::expect_sshd(guest, 2222, 22)?;
    // The generator was enough.
    guest.sh(
        "grep -q 'ListenStream=0.0.0.0:2222' /run/systemd/generator/ssh.socket.d/addresses.conf",
    )?;
    guest.sh("! test -e /etc/systemd/system/ssh.socket.d")?;

    // Something of the operator's own that is read after the generator's.
    guest.sh("mkdir -p /etc/systemd/system/ssh.socket.d && \
         printf '[Socket]\\nListenStream=\\nListenStream=22\\nBindIPv6Only=default\\n' \
         > /etc/systemd/system/ssh.socket.d/override.conf && systemctl daemon-reload && \
         systemctl stop ssh.service && systemctl restart ssh.socket")?;
    host::expect_sshd(guest, 22, 2222)?;
    let moved = move_sshd(guest)?;
    ensure!(moved.status == 0, "{moved:?}");
    expect_moved(guest)?;

    stage.power_cycle_with(crate::qemu::INSTANCE_ID, &[])?;
    let guest = stage.guest()?;
    guest.until("systemctl is-active ssh.socket", Duration::from_secs(60))?;
    expect_moved(guest)
}

/// What the operator's files say of ports and addresses, by `ssh.service`.
pub(super) fn lines(stage: &mut Stage) -> Result<()> {
    let guest = prepared(stage)?;
    let original = guest.sh("cat /etc/ssh/sshd_config")?;

    // A command line outdoes every file.
    guest.sh(&format!("{} && systemctl restart ssh.service", options("-p 22")))?;
    let refused = move_sshd(guest)?;
    let why = "take `-p 22` out of SSHD_OPTS in /etc/default/ssh";
    ensure!(refused.status == 1 && refused.stderr.contains(why), "{refused:?}");
    host::expect_sshd(guest, 22, 2222)?;
    guest.sh(&format!("{} && systemctl restart ssh.service", options("")))?;
    let session = Session::open(guest)?;

    // Ports add up, and ours outdoes this one: the file stays as it is.
    guest.sh("echo 'Port 22' >> /etc/ssh/sshd_config && systemctl reload ssh.service")?;
    let moved = move_sshd(guest)?;
    ensure!(moved.status == 0, "{moved:?}");
    expect_moved(guest)?;
    let now = guest.sh("cat /etc/ssh/sshd_config")?;
    ensure!(now == format!("{original}Port 22\n"), "the operator's file was changed: {now}");
    session.expect_open(guest)?;
    other_ports(guest)?;
    session.expect_open(guest)?;

    // An address of the operator's own cannot be outdone: exactly its line is set aside.
    let other = "# Ours\\nListenAddress 0.0.0.0:22\\nMatch User nobody\\n  X11Forwarding no\\n";
    guest.sh(&format!(
        "rm /etc/ssh/sshd_config.d/10-hostagent.conf && printf '{other}' \
         > /etc/ssh/sshd_config.d/50-ours.conf && chmod 0640 /etc/ssh/sshd_config.d/50-ours.conf && \
         chgrp adm /etc/ssh/sshd_config.d/50-ours.conf && systemctl reload ssh.service"
    ))?;
    guest.until("ss -ltn | grep -q '0.0.0.0:22 '", Duration::from_secs(20))?;
    let plan = host::hostagent(guest, "plan --only sshd-port")?;
    ensure!(
        plan.stdout.contains("`ListenAddress 0.0.0.0:22` in /etc/ssh/sshd_config.d/50-ours.conf"),
        "{plan:?}"
    );
    let before = guest.sh(CONFIGURATION)?;

    // First with a port on which nobody answers: the change is undone, the file as it was.
    guest.sh("iptables -A INPUT -p tcp --dport 2222 -j REJECT --reject-with tcp-reset")?;
    let undone = move_sshd(guest)?;
    ensure!(undone.status == 1, "{undone:?}");
    ensure!(undone.stderr.contains("is as it was before"), "{undone:?}");
    let after = guest.sh(CONFIGURATION)?;
    ensure!(before == after, "the configuration was not put back:\n{before}\n{after}");
    guest.sh("ss -ltnp | grep '0.0.0.0:22 ' | grep -q sshd && ! ss -ltn | grep -q ':2222 '")?;
    session.expect_open(guest)?;
    guest.sh("iptables -D INPUT -p tcp --dport 2222 -j REJECT --reject-with tcp-reset")?;

    let moved = move_sshd(guest)?;
    ensure!(moved.status == 0, "{moved:?}");
    let verified = host::hostagent(guest, "verify --only sshd-port")?;
    ensure!(verified.status == 0, "{verified:?}");
    session.expect_open(guest)?;
    guest.sh("test \"$(ss -Hltn sport = 2222 | awk '{print $4}')\" = 0.0.0.0:2222")?;
    guest.sh("! ss -ltn | grep -q ':22 '")?;
    let now = guest
        .sh("cd /etc/ssh/sshd_config.d && cat 50-ours.conf && stat -c '%a %G' 50-ours.conf")?;
    let expected = "# Ours\n# Set aside by hostagent (control sshd-port): ListenAddress 0.0.0.0:22\n\
        ListenAddress 0.0.0.0\nMatch User nobody\n  X11Forwarding no\n640 adm\n";
    ensure!(now == expected, "{now}");
    guest
        .sh("cd /etc/ssh/sshd_config.d && grep -qx 'ListenAddress 0.0.0.0:22' 50-ours.conf.before-hostagent && \
             grep -qx '# Set aside by hostagent (control sshd-port): Port 22' ../sshd_config")
        .map(drop)
}

/// Sets what `ssh.service` has on sshd's command line.
fn options(text: &str) -> String {
    format!("sed -i 's/^SSHD_OPTS=.*/SSHD_OPTS=\"{text}\"/' /etc/default/ssh")
}

/// Passwords are turned off once somebody has a key, and what stands in the way is named.
pub(super) fn hardening(stage: &mut Stage) -> Result<()> {
    let guest = prepared(stage)?;
    guest.sh(&format!("rm {SSHD_FRAGMENT}"))?;
    let harden = |guest: &mut Guest| host::hostagent(guest, "provision --only sshd-hardening");
    let ours = "/etc/ssh/sshd_config.d/00-hostagent-hardening.conf";
    let effective = "sshd -T -C user=admin,host=x,addr=10.0.0.9";
    // Nobody has a key, and somebody a password: he would be locked out.
    guest.sh("id admin && echo admin:Secret-1 | chpasswd")?;
    let refused = harden(guest)?;
    ensure!(
        refused.status == 1 && refused.stderr.contains("these have passwords: admin"),
        "{refused:?}"
    );
    guest.sh(&format!("{effective} | grep -qx 'passwordauthentication yes'"))?;
    guest
        .sh(&format!("{effective} | grep -qx 'x11forwarding no'"))
        .context("the rest was not done")?;
    host::expect_sshd(guest, 2222, 22)?;

    guest.sh("rm -f /run/key* && ssh-keygen -q -t ed25519 -N '' -f /run/key && cd ~admin && \
         install -d -m 0700 -o admin -g admin .ssh && \
         install -m 0600 -o admin -g admin /run/key.pub .ssh/authorized_keys")?;
    let hardened = harden(guest)?;
    ensure!(hardened.status == 0, "{hardened:?}");
    host::expect_sshd(guest, 2222, 22)?;
    let to = "-p 2222 -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o BatchMode=yes admin@127.0.0.1";
    guest.sh(&format!("test \"$(ssh -i /run/key {to} sudo -n id -u)\" = 0"))?;
    let denied = guest.run(&Script::new(&format!("ssh -o PubkeyAuthentication=no {to} true")))?;
    ensure!(denied.stderr.contains("Permission denied (publickey)"), "{denied:?}");
    let weak = guest
        .run(&Script::new(&format!("ssh -m hmac-sha1 -c aes128-ctr -i /run/key {to} true")))?;
    ensure!(weak.stderr.contains("no matching MAC found"), "{weak:?}");
    // A second run has nothing to do.
    let before = guest.sh(&format!("stat -c '%i %z' {ours}"))?;
    ensure!(harden(guest)?.status == 0, "the second run failed");
    ensure!(before == guest.sh(&format!("stat -c '%i %z' {ours}"))?, "the second run wrote");

    // Behind Match, for somebody else than who is asked about.
    guest.sh(
        "printf 'Match User backup\\n  PasswordAuthentication yes\\n' >> /etc/ssh/sshd_config",
    )?;
    let seen = host::hostagent(guest, "verify --only sshd-hardening")?;
    let expected = "PasswordAuthentication is yes in /etc/ssh/sshd_config, line";
    ensure!(seen.status == 1 && seen.stdout.contains(expected), "{seen:?}");
    // The other way round: right for some connections, and wrong for all others.
    guest.sh("sed -i '/^Match User backup/,$d' /etc/ssh/sshd_config")?;
    guest.sh(&format!(
        "cp {ours} /run/ours && sed -i '/^PasswordAuthentication/d' {ours} && \
         echo 'PasswordAuthentication yes' > /etc/ssh/sshd_config.d/20-yes.conf"
    ))?;
    for only in ["User root", "Address 127.0.0.1", "LocalPort 2222", "Host localhost"] {
        guest.sh(&format!(
            "printf 'Match {only}\\n  PasswordAuthentication no\\n' > /etc/ssh/sshd_config.d/30-match.conf"
        ))?;
        let seen = host::hostagent(guest, "verify --only sshd-hardening")?;
        let expected = "PasswordAuthentication is yes";
        ensure!(seen.status == 1 && seen.stdout.contains(expected), "{only}: {seen:?}");
    }
    guest.sh(&format!("rm /etc/ssh/sshd_config.d/[23]0-*.conf && cp /run/ours {ours}"))?;
    guest.sh(
        "printf 'Match User backup\\n  PasswordAuthentication yes\\n' >> /etc/ssh/sshd_config",
    )?;
    host::configure(guest, "report", "[sshd]\nhardening = \"report\"\n")?;
    let seen = host::hostagent(guest, "verify --only sshd-hardening")?;
    ensure!(seen.status == 0 && seen.stdout.contains("WARNING"), "{seen:?}");
    guest.sh("rm /etc/hostagent/conf.d/report.toml && sed -i '/^Match User backup/,$d' /etc/ssh/sshd_config")?;

    // On the command line of the next start.
    guest.sh(&options("-o PasswordAuthentication=yes"))?;
    let seen = host::hostagent(guest, "verify --only sshd-hardening")?;
    let expected = "PasswordAuthentication is yes";
    ensure!(seen.status == 1 && seen.stdout.contains(expected), "{seen:?}");
    guest.sh(&options(""))?;

    // By a drop-in for the unit: of the next start, before and after systemd has read it; and of the
    // process that runs, when the drop-in is gone.
    let seen = |guest: &mut Guest, status: i64, expected: &str| {
        let seen = host::hostagent(guest, "verify --only sshd-hardening")?;
        ensure!(seen.status == status && seen.stdout.contains(expected), "{expected}: {seen:?}");
        anyhow::Ok(())
    };
    let start_with = |more: &str| {
        format!(
            "mkdir -p /etc/systemd/system/ssh.service.d && printf '%s\n' '[Service]' ExecStart= \
             'ExecStart=/usr/sbin/sshd -D $SSHD_OPTS {more}' > /etc/systemd/system/ssh.service.d/more.conf"
        )
    };
    guest.sh(&start_with("-o PasswordAuthentication=yes"))?;
    seen(guest, 2, "daemon-reload")?;
    guest.sh("systemctl daemon-reload")?;
    seen(guest, 1, "PasswordAuthentication is yes")?;
    guest.sh("systemctl restart ssh.service")?;
    seen(guest, 1, "PasswordAuthentication is yes")?;
    guest.sh("rm -r /etc/systemd/system/ssh.service.d && systemctl daemon-reload")?;
    seen(guest, 1, "sshd runs with `-o PasswordAuthentication=yes`")?;
    guest.sh(&format!("systemctl restart ssh.service && {}", start_with("-f /run/other")))?;
    guest.sh("cp /etc/ssh/sshd_config /run/other && systemctl daemon-reload")?;
    seen(guest, 1, "sshd is told to read /run/other")?;
    guest
        .sh("sed -i s,/usr/sbin/sshd,/usr/bin/env, /etc/systemd/system/ssh.service.d/more.conf")?;
    guest.sh("systemctl daemon-reload")?;
    seen(guest, 2, "ssh.service starts /usr/bin/env")?;
    guest.sh("rm -r /etc/systemd/system/ssh.service.d && systemctl daemon-reload")?;
    seen(guest, 0, "keys only")?;

    // What is read before ours: the change does not take effect, and is undone.
    guest.sh(&format!(
        "rm {ours} && echo 'X11Forwarding yes' > /etc/ssh/sshd_config.d/00-first.conf"
    ))?;
    let undone = harden(guest)?;
    ensure!(undone.status == 1 && undone.stderr.contains("sshd is as it was before"), "{undone:?}");
    guest.sh(&format!("! test -e {ours}"))?;
    host::expect_sshd(guest, 2222, 22)
}

/// A session over SSH from the instance to itself.
struct Session {
    /// Where it is written what the session is to answer.
    input: &'static str,
    /// Where its answers are.
    output: &'static str,
}

impl Session {
    /// Logs in with a key, and stays.
    fn open(guest: &mut Guest) -> Result<Self> {
        guest.sh(
            "mkdir -p -m 0700 /root/.ssh && rm -f /run/key* && ssh-keygen -q -t ed25519 -N '' -f /run/key && \
             cat /run/key.pub >> /root/.ssh/authorized_keys && rm -f /run/in /run/out && mkfifo /run/in",
        )?;
        // The script reads from a pipe that stays open, and answers what is written there.
        guest.start(
            "sleep 3600 > /run/in & ssh -i /run/key -p 22 -o StrictHostKeyChecking=no \
             -o UserKnownHostsFile=/dev/null root@127.0.0.1 'while read -r l; do echo got $l; done' \
             < /run/in > /run/out 2> /run/err",
        )?;
        let session = Self { input: "/run/in", output: "/run/out" };
        session.expect_open(guest)?;
        Ok(session)
    }

    /// Expects it to answer.
    fn expect_open(&self, guest: &mut Guest) -> Result<()> {
        let Self { input, output } = self;
        let word = guest
            .sh(&format!("date +%s%N > /run/word && cat /run/word > {input} && cat /run/word"))?;
        let script = format!("grep -q 'got {}' {output} || ! cat /run/err", word.trim());
        guest.until(&script, Duration::from_secs(40)).context("the session is closed")?;
        Ok(())
    }
}

/// Killed in the middle of a change, the host answers on the old or the new port after the next boot,
/// and the next run finishes it.
pub(super) fn cut(stage: &mut Stage) -> Result<()> {
    prepared(stage)?;
    for by in ["service", "socket"] {
        let guest = stage.guest()?;
        if by == "socket" {
            guest.sh(
                "rm -rf /etc/ssh/sshd_config.d/10-hostagent.conf && systemctl reload ssh.service",
            )?;
            guest.until("ss -ltn | grep -q ':22 '", Duration::from_secs(20))?;
            by_socket(guest)?;
        }
        // The first moment at which both ports answer: in the middle of everything.
        guest.sh("sync")?;
        guest
            .start("AWS_ENDPOINT_URL=http://169.254.169.5 hostagent provision --only sshd-port")?;
        let both = "ss -ltn | grep -q ':2222 '";
        guest.run(&Script::new(&format!(
            "for i in $(seq 600); do {both} && exit 0; sleep 0.05; done; exit 1"
        )))?;
        stage.power_cycle_with(crate::qemu::INSTANCE_ID, &[])?;
        let guest = stage.guest()?;
        guest.until("ss -ltn | grep -Eq ':(22|2222) '", Duration::from_secs(60))?;
        let moved = move_sshd(guest)?;
        ensure!(moved.status == 0, "by {by}: {moved:?}");
        expect_moved(guest)?;
    }
    Ok(())
}
