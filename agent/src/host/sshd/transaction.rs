//! The change of sshd's port as a transaction: it ends with sshd on the new port alone, or as it was
//! before.
//!
//! First sshd listens on the old ports and the new one; only when the new one answers are the old
//! ones given up. Every file is replaced atomically and names at least one of the ports at every
//! moment, so that after a power cut sshd comes up on the old or the new one.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use super::lines::{self, Edit};
use super::{
    Answer, DROP_IN, Effective, Owners, PRIVILEGE_SEPARATION, SERVICE, SOCKET, SOCKET_DROP_IN,
    WELL_KNOWN, comes, effective, knock, listeners, ports, revive, tcp,
};
use crate::host::systemd::{Systemd, Unit};
use crate::host::{command, files, sockets};

/// How long sshd may take to answer after it was told to reload. Long: a busy, small instance.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);

/// How long one job of systemd's may take.
const JOB_DEADLINE: Duration = Duration::from_secs(60);

/// What a change of the port consists of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// The new port.
    pub port: u16,
    /// The addresses to name with the port, so that a `Port` elsewhere counts for nothing; none where
    /// a `Port` of ours is enough.
    pub addresses: Vec<IpAddr>,
    /// The lines in other files that name another port, and that nothing of ours can outdo.
    pub edits: Vec<Edit>,
}

impl Change {
    /// Our file among sshd's, for these ports.
    fn drop_in(&self, ports: &[u16]) -> String {
        let mut text = "# Written by hostagent (control sshd-port); [sshd] port in hostagent.toml \
                        decides.\n"
            .to_owned();
        for port in ports {
            // Writing to a String cannot fail.
            _ = writeln!(text, "Port {port}");
        }
        for address in &self.addresses {
            for port in ports {
                _ = writeln!(text, "ListenAddress {}", SocketAddr::new(*address, *port));
            }
        }
        text
    }
}

/// Our file among the socket's drop-ins.
fn socket_drop_in(listen: &[SocketAddr]) -> String {
    let mut text = "# Written by hostagent (control sshd-port). Changes are overwritten.\n\
                    [Socket]\nListenStream=\n"
        .to_owned();
    for address in listen {
        _ = writeln!(text, "ListenStream={address}");
    }
    // Each family by itself: otherwise the IPv6 address takes the IPv4 one along, and the two clash.
    text.push_str("BindIPv6Only=ipv6-only\n# Before the network is up, too.\nFreeBind=yes\n");
    text
}

/// Whether a socket unit as it is loaded listens on exactly these addresses.
fn listens_on(socket: &Unit, wanted: &[SocketAddr]) -> bool {
    let mut is = tcp(socket);
    is.sort_unstable();
    is.dedup();
    let both = |v4: bool| wanted.iter().any(|address| address.is_ipv4() == v4);
    let apart = socket.bind_ipv6_only == "ipv6-only" || !(both(true) && both(false));
    apart && is == wanted
}

/// A file as it was.
struct Before {
    path: PathBuf,
    content: Option<Vec<u8>>,
}

impl Before {
    fn of(path: &Path) -> Result<Self> {
        Ok(Self { path: path.to_owned(), content: files::read_bytes(path)? })
    }

    fn put_back(&self) -> Result<()> {
        match &self.content {
            Some(content) if files::read_bytes(&self.path)?.as_ref() == Some(content) => Ok(()),
            Some(content) if self.path.exists() => files::rewrite(&self.path, content),
            Some(content) => {
                files::write_atomic(&self.path, &String::from_utf8_lossy(content), 0o644)
            }
            None => files::remove(&self.path),
        }
    }
}

/// A file of the operator's that is changed in place.
struct Edited {
    before: Before,
    after: Vec<u8>,
}

impl Edited {
    /// A copy of what it was, beside it; `sshd_config.d/*.conf` does not match the name.
    fn copy(&self) -> PathBuf {
        let mut name = self.before.path.clone().into_os_string();
        name.push(".before-hostagent");
        name.into()
    }
}

/// A change that is under way.
struct Transaction<'a> {
    systemd: &'a Systemd,
    change: &'a Change,
    /// sshd's own configuration before the change.
    effective: Effective,
    /// The ports on which sshd listened.
    live: Vec<u16>,
    /// Whether `ssh.socket` was up: then its sockets are what listens.
    by_socket: bool,
    /// The files of ours.
    ours: [Before; 2],
    /// The files of the operator's.
    edited: Vec<Edited>,
}

/// Moves sshd to a port, and away from every other.
///
/// If anything is not as it should be, the configuration is what it was and sshd answers on the old
/// ports, or the error says that it does not. What counts is what listens, not what the configuration
/// says: it may not be in force.
pub async fn move_port(systemd: &Systemd, change: &Change) -> Result<()> {
    let it = Transaction::begin(systemd, change).await?;
    let Err(error) = it.carry_out().await else { return Ok(()) };
    warn!(control = "sshd-port", "undoing the change to sshd: {error:#}");
    match it.undo().await {
        Ok(()) => Err(error.context("sshd was not moved, and is as it was before")),
        Err(undoing) => Err(error.context(format!(
            "sshd was not moved, and bringing it back failed too ({undoing:#}); do not close your \
             session"
        ))),
    }
}

impl<'a> Transaction<'a> {
    /// Looks at everything that has to be put back if this fails. Changes nothing of it.
    async fn begin(systemd: &'a Systemd, change: &'a Change) -> Result<Self> {
        files::make_directories(Path::new(PRIVILEGE_SEPARATION), 0o755)?;
        let effective =
            effective(systemd).await.context("reading sshd's configuration before any change")?;
        let (service, socket) = (systemd.unit(SERVICE).await?, systemd.unit(SOCKET).await?);
        ensure!(
            socket.is_up() || (service.active_state == "active" && service.main_pid != 0),
            "{SERVICE} is {}, and {SOCKET} {}",
            service.active_state,
            socket.active_state
        );
        let owners = Owners::of(&service, &socket);
        let mut live = effective.ports();
        live.extend(ports(&owners.socket));
        live.extend([WELL_KNOWN, change.port]);
        live.sort_unstable();
        live.dedup();
        let mut error = None;
        live.retain(|port| match listeners(*port, &owners) {
            Ok(seen) => {
                if let Some(stranger) = seen.iter().find(|l| *port == change.port && !l.owned) {
                    let address = stranger.address;
                    error = Some(anyhow::anyhow!(
                        "something other than sshd listens on {address}; sshd is not moved there"
                    ));
                }
                seen.iter().any(|l| l.owned)
            }
            Err(e) => {
                error = Some(e);
                false
            }
        });
        if let Some(error) = error {
            return Err(error);
        }
        let mut edited: Vec<Edited> = Vec::new();
        for edit in &change.edits {
            if edited.iter().any(|file| file.before.path == edit.file) {
                continue;
            }
            let before = Before::of(&edit.file)?;
            let edits: Vec<_> = change.edits.iter().filter(|e| e.file == edit.file).collect();
            let after = lines::edited(before.content.as_deref().unwrap_or_default(), &edits)?;
            edited.push(Edited { before, after });
        }
        let ours = [Before::of(Path::new(DROP_IN))?, Before::of(Path::new(SOCKET_DROP_IN))?];
        let by_socket = socket.is_up();
        Ok(Self { systemd, change, effective, live, by_socket, ours, edited })
    }

    async fn carry_out(&self) -> Result<()> {
        let port = self.change.port;
        if !self.live.contains(&port) {
            let mut both = self.live.clone();
            both.push(port);
            let now = self.configure(&both).await?;
            self.enforce(&now, &both).await?;
            self.answers(&now, port).await?;
            info!(control = "sshd-port", "sshd answers on {port}; giving up the other ports");
        }
        let now = self.configure(&[port]).await?;
        self.enforce(&now, &[port]).await?;
        // In this order: while an old port listens, what answers may be the process from before.
        self.gone().await?;
        self.answers(&now, port).await
    }

    /// Writes sshd's configuration for these ports, our file first: until the others are changed,
    /// theirs add up to ours. Returns what sshd makes of it.
    async fn configure(&self, ports: &[u16]) -> Result<Effective> {
        files::write_atomic(Path::new(DROP_IN), &self.change.drop_in(ports), 0o644)?;
        for file in &self.edited {
            if files::read_bytes(&file.before.path)?.as_ref() != Some(&file.after) {
                let content = file.before.content.as_deref().unwrap_or_default();
                files::copy_beside(&file.before.path, &file.copy(), content)?;
                files::rewrite(&file.before.path, &file.after)?;
            }
        }
        files::make_directories(Path::new(PRIVILEGE_SEPARATION), 0o755)?;
        command::run(command::SSHD, &["-t"], Duration::from_secs(30))
            .await?
            .success()
            .context("sshd does not accept the new configuration")?;
        let now =
            effective(self.systemd).await.context("sshd does not accept the new configuration")?;
        if !now.ports().contains(&self.change.port) {
            bail!(
                "sshd's configuration does not include {DROP_IN}; add `Include \
                 /etc/ssh/sshd_config.d/*.conf` to {}",
                lines::MAIN
            );
        }
        if let Some(extra) = now.ports().iter().find(|p| !ports.contains(p)) {
            bail!("sshd would listen on {extra} as well; see `sshd -T | grep -i listenaddress`");
        }
        Ok(now)
    }

    /// Brings what is configured for these ports into force.
    async fn enforce(&self, effective: &Effective, ports: &[u16]) -> Result<()> {
        let mut socket = self.systemd.unit(SOCKET).await?;
        if socket.is_up() || comes(&socket) {
            let mut wanted = effective.on(ports);
            wanted.retain(|address| address.is_ipv4() || sockets::has_ipv6());
            // This is what runs a generator.
            self.systemd.reload_manager().await?;
            socket = self.systemd.unit(SOCKET).await?;
            if !listens_on(&socket, &wanted) {
                let path = Path::new(SOCKET_DROP_IN);
                files::write_atomic(path, &socket_drop_in(&wanted), 0o644)?;
                self.systemd.reload_manager().await?;
                socket = self.systemd.unit(SOCKET).await?;
                ensure!(
                    listens_on(&socket, &wanted),
                    "{SOCKET} is told to listen on {} by something that is read after \
                     {SOCKET_DROP_IN}",
                    socket.listen.join(", ")
                );
            }
        }
        self.renew().await
    }

    /// Makes what listens read its configuration. Open sessions go on: the service's main process
    /// alone is stopped (`KillMode=process`), and they are not the socket's.
    async fn renew(&self) -> Result<()> {
        if !self.by_socket {
            return self.systemd.reload(SERVICE, JOB_DEADLINE).await;
        }
        let mut tries = 3;
        loop {
            // A socket is not started while its service holds it; until then PID 1 listens.
            if self.systemd.unit(SERVICE).await?.is_up() {
                self.systemd.stop(SERVICE, JOB_DEADLINE).await?;
            }
            self.systemd.forget_failure(SERVICE).await;
            self.systemd.forget_failure(SOCKET).await;
            tries -= 1;
            match self.systemd.restart(SOCKET, JOB_DEADLINE).await {
                // Somebody connected between the two, and the service is up again.
                Err(_) if tries > 0 && self.systemd.unit(SERVICE).await?.is_up() => {}
                result => return result,
            }
        }
    }

    /// Waits until sshd itself answers on `port` wherever it is told to listen.
    async fn answers(&self, effective: &Effective, port: u16) -> Result<()> {
        let until = Instant::now() + ANSWER_DEADLINE;
        let mut waiting = effective.doors(port);
        loop {
            let mut last = None;
            let mut still = Vec::new();
            // What has answered is not asked again: sshd 9.8 and later turns a peer away that
            // connects often without logging in (PerSourcePenalties in sshd_config(5)).
            for door in waiting {
                match knock(door).await {
                    Ok(Answer::Banner(_)) => {}
                    Ok(Answer::NoAddressFamily) if no_ipv6(&door) => {}
                    other => {
                        last = Some((door, other));
                        still.push(door);
                    }
                }
            }
            waiting = still;
            let Some((door, other)) = last else { break };
            if Instant::now() > until {
                bail!("sshd does not answer on {door}: {other:?}");
            }
            sleep(Duration::from_millis(500)).await;
        }
        let (service, socket) =
            (self.systemd.unit(SERVICE).await?, self.systemd.unit(SOCKET).await?);
        let listeners = listeners(port, &Owners::of(&service, &socket))?;
        match listeners.iter().find(|l| !l.owned) {
            Some(stranger) => bail!("what answers on {} is not sshd", stranger.address),
            None if listeners.is_empty() => bail!("nothing listens on port {port} any more"),
            None => Ok(()),
        }
    }

    /// Waits until nothing listens on the old ports any more.
    async fn gone(&self) -> Result<()> {
        let until = Instant::now() + ANSWER_DEADLINE;
        for port in self.live.iter().filter(|p| **p != self.change.port) {
            loop {
                let still = listeners(*port, &Owners::default())?;
                if still.is_empty() {
                    break;
                }
                if Instant::now() > until {
                    bail!("something still listens on {}", still[0].address);
                }
                sleep(Duration::from_millis(200)).await;
            }
        }
        Ok(())
    }

    /// Puts everything back, the operator's files first: until ours is, theirs add up to it.
    async fn undo(&self) -> Result<()> {
        let mut restored = Ok(());
        for before in self.edited.iter().map(|file| &file.before).chain(&self.ours) {
            restored = restored.and(before.put_back());
        }
        for file in &self.edited {
            restored = restored.and_then(|()| files::remove(&file.copy()));
        }
        // Even if a file could not be put back: a daemon on any port is better than none. A reload
        // that sshd refuses leaves the old process running; a start revives a dead one.
        if self.by_socket || self.systemd.unit(SOCKET).await.is_ok_and(|socket| comes(&socket)) {
            restored = restored.and(self.systemd.reload_manager().await);
        }
        let renewed = self.renew().await;
        revive(self.systemd, renewed, async || {
            for port in &self.live {
                self.answers(&self.effective, *port).await?;
            }
            Ok(())
        })
        .await?;
        restored
    }
}

/// Whether an address is this machine's own in IPv6: without that nobody reaches it so.
fn no_ipv6(door: &SocketAddr) -> bool {
    door.is_ipv6() && door.ip().is_loopback()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(list: &[&str]) -> Vec<SocketAddr> {
        list.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn addresses_are_named_only_where_a_port_is_not_enough() {
        let change = Change { port: 2222, addresses: vec![], edits: vec![] };
        let text = change.drop_in(&[22, 2222]);
        assert!(text.ends_with("decides.\nPort 22\nPort 2222\n"), "{text}");
        let any = ["0.0.0.0", "::"].map(|text| text.parse().unwrap()).to_vec();
        let text = Change { addresses: any, ..change }.drop_in(&[2222]);
        let expected = "Port 2222\nListenAddress 0.0.0.0:2222\nListenAddress [::]:2222\n";
        assert!(text.ends_with(expected), "{text}");
    }

    #[test]
    fn a_socket_is_fit_only_if_its_families_do_not_clash() {
        let wanted = addresses(&["0.0.0.0:2222", "[::]:2222"]);
        let socket = |listen: &[&str], only: &str| Unit {
            listen: listen.iter().map(|&text| text.to_owned()).collect(),
            bind_ipv6_only: only.into(),
            ..Unit::default()
        };
        let both = ["[::]:2222", "0.0.0.0:2222"];
        assert!(listens_on(&socket(&both, "ipv6-only"), &wanted));
        // The second would find the address in use, and the socket would not start.
        assert!(!listens_on(&socket(&both, "default"), &wanted));
        assert!(!listens_on(&socket(&["[::]:2222"], "default"), &wanted));
        assert!(!listens_on(
            &socket(&["[::]:22", "0.0.0.0:2222", "[::]:2222"], "ipv6-only"),
            &wanted
        ));
        assert!(!listens_on(&socket(&[], "ipv6-only"), &wanted));
        let one = addresses(&["10.0.0.5:2222"]);
        assert!(listens_on(&socket(&["10.0.0.5:2222"], "default"), &one));
    }

    #[test]
    fn the_socket_forgets_what_it_listened_on() {
        let text = socket_drop_in(&addresses(&["0.0.0.0:2222", "[::]:2222"]));
        assert!(text.contains("[Socket]\nListenStream=\nListenStream=0.0.0.0:2222\n"), "{text}");
        assert!(text.contains("\nListenStream=[::]:2222\nBindIPv6Only=ipv6-only\n"), "{text}");
    }
}
