//! The SSH daemon: what it is configured to do, what truly answers, and whose the sockets are that
//! listen. The change of its port is in [`transaction`], that of what it lets in in [`hardening`], the
//! lines of its configuration in [`lines`], its command line in [`options`], who can log in in
//! [`accounts`].
//!
//! Who listens differs. Under `ssh.service` it is sshd. Under `ssh.socket` it is PID 1, which gives
//! its sockets to `ssh.service` at the first connection (Debian, Ubuntu since 22.10) or starts an
//! `ssh@.service` for each (`Accept=yes`, Ubuntu 22.04). There `Port` and `ListenAddress` of sshd
//! count for nothing, but on Ubuntu since 24.04 a generator (`sshd-socket-generator`) turns them into
//! a drop-in for the socket whenever systemd reads its units.

pub mod accounts;
pub mod hardening;
pub mod lines;
pub mod options;
pub mod transaction;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tracing::warn;

use super::sockets;
use super::systemd::{Systemd, Unit};

/// Our file among sshd's. sshd reads `sshd_config.d/*.conf` before the rest of its configuration.
pub const DROP_IN: &str = "/etc/ssh/sshd_config.d/10-hostagent.conf";

/// The service that runs sshd on Debian and Ubuntu.
pub const SERVICE: &str = "ssh.service";

/// The socket that starts it on demand where it is enabled, as on Ubuntu 22.10 and later.
pub const SOCKET: &str = "ssh.socket";

/// Our file among the socket's drop-ins. Read last, also after a generator's.
pub const SOCKET_DROP_IN: &str = "/etc/systemd/system/ssh.socket.d/zz-hostagent.conf";

/// The port that everybody tries.
pub const WELL_KNOWN: u16 = 22;

/// The directory without which sshd does not even check its configuration. `ssh.service` makes it,
/// and removes it when it stops.
const PRIVILEGE_SEPARATION: &str = "/run/sshd";

/// How long starting sshd's unit may take after a change was taken back.
const REVIVAL_DEADLINE: Duration = Duration::from_secs(60);

/// What `sshd -T` says is in effect.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Effective {
    /// `listenaddress`, without duplicates: where sshd listens when it opens its sockets itself. Not
    /// `port`, which counts only for addresses that are given without one.
    pub listen: Vec<SocketAddr>,
}

impl Effective {
    /// The ports of [`Effective::listen`], without duplicates.
    #[must_use]
    pub fn ports(&self) -> Vec<u16> {
        ports(&self.listen)
    }

    /// Where a client on this machine reaches sshd on `port`, IPv4 first: for "every address" that is
    /// the loopback address of its family.
    #[must_use]
    pub fn doors(&self, port: u16) -> Vec<SocketAddr> {
        let mut doors: Vec<_> = self
            .listen
            .iter()
            .map(|address| {
                let ip = match address.ip() {
                    IpAddr::V4(ip) if ip.is_unspecified() => LOOPBACKS[0],
                    IpAddr::V6(ip) if ip.is_unspecified() => LOOPBACKS[1],
                    ip => ip,
                };
                SocketAddr::new(ip, port)
            })
            .collect();
        doors.sort_unstable();
        doors.dedup();
        doors
    }

    /// The addresses of [`Effective::listen`], each with these ports instead of its own.
    #[must_use]
    pub fn on(&self, ports: &[u16]) -> Vec<SocketAddr> {
        let mut all: Vec<_> = self
            .listen
            .iter()
            .flat_map(|address| ports.iter().map(|port| SocketAddr::new(address.ip(), *port)))
            .collect();
        all.sort_unstable();
        all.dedup();
        all
    }
}

/// The ports of addresses, in order, without duplicates.
#[must_use]
pub fn ports(addresses: &[SocketAddr]) -> Vec<u16> {
    let mut ports: Vec<u16> = addresses.iter().map(SocketAddr::port).collect();
    ports.sort_unstable();
    ports.dedup();
    ports
}

/// Brings sshd back after a change was taken back: where what runs could not be renewed, or does not
/// answer, whichever unit is to listen is started. Everything is tried before an error is returned.
async fn revive(
    systemd: &Systemd,
    renewed: Result<()>,
    answers: impl AsyncFn() -> Result<()>,
) -> Result<()> {
    let back = match renewed {
        Ok(()) => answers().await,
        Err(e) => Err(e),
    };
    let Err(error) = back else { return Ok(()) };
    warn!("sshd is started anew: {error:#}");
    let by_socket = systemd.unit(SOCKET).await.is_ok_and(|socket| socket.is_up() || comes(&socket));
    let units: &[&str] = if by_socket { &[SOCKET, SERVICE] } else { &[SERVICE] };
    for unit in units {
        match systemd.start(unit, REVIVAL_DEADLINE).await {
            Ok(()) => break,
            Err(e) => warn!("{e:#}"),
        }
    }
    answers().await
}

/// Asks sshd for its effective configuration.
pub async fn effective(systemd: &Systemd) -> Result<Effective> {
    parse_effective(&options::ask(systemd, options::NOBODYS).await?)
}

fn parse_effective(text: &str) -> Result<Effective> {
    let mut listen: Vec<SocketAddr> = Vec::new();
    for line in text.lines() {
        if let Some(("listenaddress", address)) = line.split_once(' ') {
            let address = address.trim();
            let address = address.parse().with_context(|| {
                format!("`sshd -T` names the address {address:?}, which is not understood")
            })?;
            if !listen.contains(&address) {
                listen.push(address);
            }
        }
    }
    if listen.is_empty() {
        bail!("`sshd -T` names no address to listen on");
    }
    Ok(Effective { listen })
}

/// Makes sshd's configuration readable to [`effective`] by a look that changes nothing: where sshd
/// waits behind a socket and lacks its directory, the first connection brings both.
pub async fn wake(socket: &Unit) {
    if Path::new(PRIVILEGE_SEPARATION).exists() || !socket.is_up() {
        return;
    }
    let listen = tcp(socket);
    if let Some(address) = listen.first() {
        let door = Effective { listen: vec![*address] }.doors(address.port())[0];
        // What comes of it shows in what is looked at next.
        drop(knock(door).await);
    }
}

/// The TCP addresses on which a socket unit is told to listen.
#[must_use]
pub fn tcp(socket: &Unit) -> Vec<SocketAddr> {
    socket.listen.iter().filter_map(|address| address.parse().ok()).collect()
}

/// Whether systemd starts a unit at the next boot, as far as its unit file says.
#[must_use]
pub fn comes(unit: &Unit) -> bool {
    unit.exists()
        && unit.load_state != "masked"
        && (unit.unit_file_state == "enabled" || unit.wanted_by.iter().any(|by| by != SERVICE))
}

/// What answers at an address and port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// A server that says it speaks SSH.
    Banner(String),
    /// Something that does not: what it said, or that it said nothing.
    NotSsh(String),
    /// Nothing listens there.
    Refused,
    /// The machine does not have this address family.
    NoAddressFamily,
}

/// Connects and reads the banner (RFC 4253, section 4.2).
pub async fn knock(address: SocketAddr) -> Result<Answer> {
    let doing = || format!("connecting to {address}");
    let stream = match timeout(Duration::from_secs(5), TcpStream::connect(address)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(e)) => {
            return match e.raw_os_error() {
                Some(nix::libc::ECONNREFUSED) => Ok(Answer::Refused),
                Some(
                    nix::libc::EADDRNOTAVAIL | nix::libc::EAFNOSUPPORT | nix::libc::ENETUNREACH,
                ) => Ok(Answer::NoAddressFamily),
                _ => Err(e).with_context(doing),
            };
        }
        Err(_) => bail!("{}: no answer within 5 s", doing()),
    };
    let mut line = Vec::new();
    let mut reader = BufReader::new(stream);
    let read = timeout(Duration::from_secs(10), reader.read_until(b'\n', &mut line)).await;
    // The peer's text goes into reports: nothing of it but printable characters.
    let text: String = String::from_utf8_lossy(&line)
        .trim_end()
        .chars()
        .filter(|c| !c.is_control())
        .take(80)
        .collect();
    Ok(match read {
        Ok(Ok(_)) if text.starts_with("SSH-2.0-") => Answer::Banner(text),
        Ok(Ok(_)) => Answer::NotSsh(text),
        Ok(Err(e)) => Answer::NotSsh(e.to_string()),
        Err(_) => Answer::NotSsh("nothing within 10 s".into()),
    })
}

/// The loopback address of each family.
pub const LOOPBACKS: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

/// A socket that listens, and whose it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listener {
    /// The local address and port.
    pub address: SocketAddr,
    /// Whether it is sshd's: held by the process of `ssh.service`, or by PID 1 for `ssh.socket`.
    pub owned: bool,
}

/// Who listens for sshd.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Owners {
    /// The main process of `ssh.service`; 0 if none runs.
    pub main_pid: u32,
    /// Where PID 1 listens for `ssh.socket`; nowhere if the socket is not up. Two units cannot listen
    /// on one address.
    pub socket: Vec<SocketAddr>,
}

impl Owners {
    /// As systemd has the two units.
    #[must_use]
    pub fn of(service: &Unit, socket: &Unit) -> Self {
        let socket = if socket.is_up() { tcp(socket) } else { Vec::new() };
        Self { main_pid: service.main_pid, socket }
    }
}

/// What listens on `port`, on whichever address, and whether it is sshd's.
pub fn listeners(port: u16, owners: &Owners) -> Result<Vec<Listener>> {
    let mut entries = sockets::listening()?;
    entries.retain(|e| e.local_address.port() == port);
    if entries.is_empty() {
        return Ok(Vec::new());
    }
    let own = if owners.main_pid == 0 { Vec::new() } else { sockets::held_by(owners.main_pid)? };
    let first = if owners.socket.is_empty() { Vec::new() } else { sockets::held_by(1)? };
    let owned = |address: &SocketAddr, inode: u64| {
        own.contains(&inode) || (owners.socket.contains(address) && first.contains(&inode))
    };
    Ok(entries
        .into_iter()
        .map(|e| Listener { address: e.local_address, owned: owned(&e.local_address, e.inode) })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt as _;
    use tokio::net::TcpListener;

    #[test]
    fn sshd_t_is_read() {
        let text = "port 22\nport 2222\naddressfamily any\nlistenaddress [::]:22\n\
                    listenaddress 10.0.0.5:2222\nlistenaddress [::]:22\nusepam yes\n";
        let effective = parse_effective(text).unwrap();
        let listen: Vec<String> = effective.listen.iter().map(ToString::to_string).collect();
        assert_eq!(listen, ["[::]:22", "10.0.0.5:2222"]);
        assert_eq!(effective.ports(), [22, 2222]);
        // What is not understood is not passed over.
        assert!(parse_effective("port 22\n").is_err());
        assert!(parse_effective("listenaddress 10.0.0.5:22 rdomain blue\n").is_err());
    }

    #[test]
    fn sshd_is_looked_for_where_it_is_told_to_listen() {
        let doors = |listen: &[&str]| {
            let listen = listen.iter().map(|text| text.parse().unwrap()).collect();
            let doors = Effective { listen }.doors(2222);
            doors.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(doors(&["[::]:22", "0.0.0.0:22"]), ["127.0.0.1:2222", "[::1]:2222"]);
        assert_eq!(doors(&["[::]:22", "[::]:2222"]), ["[::1]:2222"]);
        assert_eq!(doors(&["10.0.0.5:22"]), ["10.0.0.5:2222"]);
    }

    #[test]
    fn a_unit_comes_at_the_next_boot_if_anything_but_its_service_wants_it() {
        let unit = |load: &str, file: &str, by: &[&str]| Unit {
            load_state: load.into(),
            unit_file_state: file.into(),
            wanted_by: by.iter().map(|&name| name.to_owned()).collect(),
            ..Unit::default()
        };
        assert!(comes(&unit("loaded", "enabled", &[])));
        assert!(comes(&unit("loaded", "disabled", &["sockets.target"])));
        assert!(!comes(&unit("loaded", "disabled", &[])));
        // Ubuntu's ssh.socket is required by ssh.service.
        assert!(!comes(&unit("loaded", "disabled", &["ssh.service"])));
        assert!(!comes(&unit("masked", "masked", &["sockets.target"])));
        assert!(!comes(&unit("not-found", "", &["sockets.target"])));
    }

    #[tokio::test]
    async fn only_an_ssh_banner_is_an_answer() {
        let serve = |text: &'static [u8]| async move {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let server = async move {
                let (mut stream, _) = listener.accept().await.unwrap();
                stream.write_all(text).await.unwrap();
            };
            let (answer, ()) = tokio::join!(knock(SocketAddr::new(LOOPBACKS[0], port)), server);
            answer.unwrap()
        };
        assert_eq!(
            serve(b"SSH-2.0-OpenSSH_10\r\n").await,
            Answer::Banner("SSH-2.0-OpenSSH_10".into())
        );
        assert_eq!(serve(b"220 \x1b[31mmail\r\n").await, Answer::NotSsh("220 [31mmail".into()));
        assert_eq!(serve(b"").await, Answer::NotSsh(String::new()));
        let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        let closed = SocketAddr::new(LOOPBACKS[0], closed);
        assert_eq!(knock(closed).await.unwrap(), Answer::Refused);
    }

    #[tokio::test]
    async fn listeners_are_found_on_any_address_with_their_owner() {
        let listener = TcpListener::bind("127.0.0.9:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen = |main_pid| {
            let owners = Owners { main_pid, socket: vec![] };
            listeners(address.port(), &owners).unwrap()
        };
        assert_eq!(seen(std::process::id()), [Listener { address, owned: true }]);
        assert_eq!(seen(0), [Listener { address, owned: false }]);
        drop(listener);
        // A program that another test is starting holds a copy of it until it runs.
        for _ in 0..500 {
            if seen(0).is_empty() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("it is still there");
    }
}
