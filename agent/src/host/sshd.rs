//! The SSH daemon: what it is configured to do, what truly answers, and the change of its port as a
//! transaction that ends with sshd answering on the new port or as it was before.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use procfs::net::TcpState;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};
use tracing::{info, warn};

use super::systemd::Systemd;
use super::{command, files};

/// Our file among sshd's. sshd reads `sshd_config.d/*.conf` before the rest of its configuration.
pub const DROP_IN: &str = "/etc/ssh/sshd_config.d/10-hostagent.conf";

/// The service that runs sshd on Debian and Ubuntu.
pub const SERVICE: &str = "ssh.service";

/// The socket that starts it instead on Ubuntu 22.10 and later.
pub const SOCKET: &str = "ssh.socket";

/// How long sshd may take to answer after it was told to reload. Long: a busy, small instance.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);

/// What `sshd -T` says is in effect.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Effective {
    /// `port`, in order, without duplicates.
    pub ports: Vec<u16>,
    /// `addressfamily`: `any`, `inet` or `inet6`.
    pub address_family: String,
}

/// Asks sshd for its effective configuration.
pub async fn effective() -> Result<Effective> {
    // For a plain connection: where a Match block asks for one of these, sshd wants to know it.
    let args = ["-T", "-C", "user=root,host=localhost,addr=127.0.0.1,laddr=127.0.0.1,lport=22"];
    let output = command::run(command::SSHD, &args, Duration::from_secs(30)).await?;
    let effective = parse_effective(&output.success()?);
    if effective.ports.is_empty() {
        bail!("`sshd -T` names no port");
    }
    Ok(effective)
}

fn parse_effective(text: &str) -> Effective {
    let mut effective = Effective::default();
    for line in text.lines() {
        match line.split_once(' ') {
            Some(("port", port)) => {
                if let Ok(port) = port.trim().parse()
                    && !effective.ports.contains(&port)
                {
                    effective.ports.push(port);
                }
            }
            Some(("addressfamily", family)) => {
                family.trim().clone_into(&mut effective.address_family);
            }
            _ => {}
        }
    }
    effective
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
pub async fn knock(address: IpAddr, port: u16) -> Result<Answer> {
    let doing = || format!("connecting to {}", SocketAddr::new(address, port));
    let stream = match timeout(Duration::from_secs(5), TcpStream::connect((address, port))).await {
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
    /// Whether the process that was asked about holds it.
    pub owned: bool,
}

/// What listens on `port`, on whichever address, and whether it is the process `pid` that does.
pub fn listeners(port: u16, pid: u32) -> Result<Vec<Listener>> {
    let mut entries = procfs::net::tcp().context("reading /proc/net/tcp")?;
    // A kernel without IPv6 has no such file.
    if Path::new("/proc/net/tcp6").exists() {
        entries.extend(procfs::net::tcp6().context("reading /proc/net/tcp6")?);
    }
    entries.retain(|e| e.state == TcpState::Listen && e.local_address.port() == port);
    if entries.is_empty() {
        return Ok(Vec::new());
    }
    let own = if pid == 0 { Vec::new() } else { sockets_of(pid)? };
    Ok(entries
        .into_iter()
        .map(|e| Listener { address: e.local_address, owned: own.contains(&e.inode) })
        .collect())
}

/// The inodes of the sockets that a process holds open.
fn sockets_of(pid: u32) -> Result<Vec<u64>> {
    let doing = || format!("listing the sockets of process {pid}");
    let mut inodes = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).with_context(doing)? {
        // A descriptor may be closed between the listing and the look.
        let Ok(target) = std::fs::read_link(entry.with_context(doing)?.path()) else { continue };
        let inode = target.to_str().and_then(|t| t.strip_prefix("socket:[")?.strip_suffix(']'));
        inodes.extend(inode.and_then(|text| text.parse::<u64>().ok()));
    }
    Ok(inodes)
}

/// Moves sshd to `port`, and away from every other port.
///
/// First sshd listens on the old ports and the new one; only when the new one answers are the old
/// ones given up; and if anything is not as it should be, the configuration is what it was and sshd
/// answers on the old ports, or the error says that it does not. What counts is what listens, not
/// what the configuration says: it may not be in force.
pub async fn move_port(systemd: &Systemd, port: u16) -> Result<()> {
    let drop_in = Path::new(DROP_IN);
    let before = files::read_optional(drop_in)?;
    let pid = main_pid(systemd).await?;
    let mut old = effective().await.context("reading sshd's configuration before any change")?;
    for candidate in [WELL_KNOWN, port] {
        let live = listeners(candidate, pid)?;
        if let Some(stranger) = live.iter().find(|l| candidate == port && !l.owned) {
            bail!(
                "something other than sshd listens on {}; sshd is not moved there",
                stranger.address
            );
        }
        if !live.is_empty() && !old.ports.contains(&candidate) {
            old.ports.push(candidate);
        }
    }
    let already = !listeners(port, pid)?.is_empty();

    let result = async {
        if !already {
            let mut both = old.ports.clone();
            if !both.contains(&port) {
                both.push(port);
            }
            set_ports(systemd, drop_in, &both).await?;
            answers(systemd, port, &old.address_family).await?;
            info!(control = "sshd-port", "sshd answers on {port}; giving up the other ports");
        }
        set_ports(systemd, drop_in, &[port]).await?;
        // In this order: while an old port listens, what answers may be the process from before.
        gone(&old.ports, port).await?;
        answers(systemd, port, &old.address_family).await
    }
    .await;

    let Err(error) = result else { return Ok(()) };
    warn!(control = "sshd-port", "undoing the change to sshd: {error:#}");
    old.ports.retain(|p| *p != port || already);
    match undo(systemd, drop_in, before.as_deref(), &old).await {
        Ok(()) => Err(error.context("sshd was not moved, and is as it was before")),
        Err(undoing) => Err(error.context(format!(
            "sshd was not moved, and bringing it back failed too ({undoing:#}); do not close your \
             session"
        ))),
    }
}

/// The port that everybody tries.
pub const WELL_KNOWN: u16 = 22;

/// The process of sshd's that listens; an error if the service does not run.
async fn main_pid(systemd: &Systemd) -> Result<u32> {
    let unit = systemd.unit(SERVICE).await?;
    if unit.active_state != "active" || unit.main_pid == 0 {
        bail!("{SERVICE} is {}", unit.active_state);
    }
    Ok(unit.main_pid)
}

async fn set_ports(systemd: &Systemd, drop_in: &Path, ports: &[u16]) -> Result<()> {
    use std::fmt::Write as _;
    let mut text =
        "# Written by hostagent (control sshd-port); [sshd] port in hostagent.toml decides.\n"
            .to_owned();
    for port in ports {
        // Writing to a String cannot fail.
        _ = writeln!(text, "Port {port}");
    }
    files::write_atomic(drop_in, &text, 0o644)?;
    let now = effective().await.context("sshd does not accept the new configuration")?;
    for port in ports {
        if !now.ports.contains(port) {
            bail!(
                "sshd's configuration does not include {DROP_IN}; add `Include /etc/ssh/sshd_config.d/*.conf` to /etc/ssh/sshd_config"
            );
        }
    }
    if let Some(extra) = now.ports.iter().find(|p| !ports.contains(p)) {
        bail!(
            "another of sshd's configuration files says `Port {extra}`, and ports add up; remove that line ({})",
            who_says(*extra)
        );
    }
    systemd.reload(SERVICE, Duration::from_secs(60)).await
}

/// The files that set a port themselves, for messages.
fn who_says(port: u16) -> String {
    let mut paths = vec![Path::new("/etc/ssh/sshd_config").to_path_buf()];
    if let Ok(entries) = std::fs::read_dir("/etc/ssh/sshd_config.d") {
        paths.extend(entries.flatten().map(|e| e.path()));
    }
    let says = |text: &str| {
        text.lines().any(|line| {
            let mut words = line.split([' ', '\t', '=']).filter(|w| !w.is_empty());
            words.next().is_some_and(|w| w.eq_ignore_ascii_case("port"))
                && words.next() == Some(port.to_string().as_str())
        })
    };
    let names: Vec<String> = paths
        .iter()
        .filter(|p| *p != Path::new(DROP_IN))
        .filter(|p| std::fs::read_to_string(p).is_ok_and(|text| says(&text)))
        .map(|p| p.display().to_string())
        .collect();
    if names.is_empty() { "see `sshd -T`".to_owned() } else { names.join(", ") }
}

/// Waits until sshd itself answers on `port` in every address family that it is configured for.
async fn answers(systemd: &Systemd, port: u16, family: &str) -> Result<()> {
    let until = Instant::now() + ANSWER_DEADLINE;
    let mut waiting: Vec<IpAddr> =
        LOOPBACKS.into_iter().filter(|address| expected_on(*address, family)).collect();
    loop {
        let mut last = None;
        let mut still = Vec::new();
        // What has answered is not asked again: sshd 9.8 and later turns a peer away that connects
        // often without logging in (PerSourcePenalties in sshd_config(5)).
        for address in waiting {
            match knock(address, port).await {
                Ok(Answer::Banner(_)) => {}
                Ok(Answer::NoAddressFamily) if address.is_ipv6() => {}
                other => {
                    last = Some((address, other));
                    still.push(address);
                }
            }
        }
        waiting = still;
        let Some((address, other)) = last else { break };
        if Instant::now() > until {
            bail!("sshd does not answer on {}: {other:?}", SocketAddr::new(address, port));
        }
        sleep(Duration::from_millis(500)).await;
    }
    let listeners = listeners(port, main_pid(systemd).await?)?;
    match listeners.iter().find(|l| !l.owned) {
        Some(stranger) => bail!("what answers on {} is not {SERVICE}", stranger.address),
        None if listeners.is_empty() => bail!("nothing listens on port {port} any more"),
        None => Ok(()),
    }
}

/// Whether sshd listens in the family of `address` under `AddressFamily family`.
#[must_use]
pub fn expected_on(address: IpAddr, family: &str) -> bool {
    match family {
        "inet" => address.is_ipv4(),
        "inet6" => address.is_ipv6(),
        _ => true,
    }
}

/// Waits until nothing listens on the old ports any more.
async fn gone(old: &[u16], new: u16) -> Result<()> {
    let until = Instant::now() + ANSWER_DEADLINE;
    for port in old.iter().filter(|p| **p != new) {
        loop {
            let still = listeners(*port, 0)?;
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

async fn undo(
    systemd: &Systemd,
    drop_in: &Path,
    before: Option<&str>,
    old: &Effective,
) -> Result<()> {
    let restored = match before {
        Some(text) => files::write_atomic(drop_in, text, 0o644),
        None => files::remove(drop_in),
    };
    // Even if the file could not be put back: a daemon on any port is better than none. A reload
    // that sshd refuses leaves the old process running; a start revives a dead one.
    if let Err(e) = systemd.reload(SERVICE, Duration::from_secs(60)).await {
        warn!(control = "sshd-port", "{e:#}");
        systemd.start(SERVICE, Duration::from_secs(60)).await?;
    }
    restored?;
    for port in &old.ports {
        answers(systemd, *port, &old.address_family).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt as _;
    use tokio::net::TcpListener;

    #[test]
    fn sshd_t_is_read() {
        let text =
            "port 22\nport 2222\nport 22\naddressfamily any\nlistenaddress [::]:22\nusepam yes\n";
        let effective = parse_effective(text);
        assert_eq!(effective.ports, [22, 2222]);
        assert_eq!(effective.address_family, "any");
    }

    #[test]
    fn families_follow_the_configuration() {
        let [v4, v6] = LOOPBACKS;
        assert!(expected_on(v4, "any") && expected_on(v6, "any"));
        assert!(expected_on(v4, "inet") && !expected_on(v6, "inet"));
        assert!(!expected_on(v4, "inet6") && expected_on(v6, "inet6"));
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
            let (answer, ()) = tokio::join!(knock(LOOPBACKS[0], port), server);
            answer.unwrap()
        };
        assert_eq!(
            serve(b"SSH-2.0-OpenSSH_10\r\n").await,
            Answer::Banner("SSH-2.0-OpenSSH_10".into())
        );
        assert_eq!(serve(b"220 \x1b[31mmail\r\n").await, Answer::NotSsh("220 [31mmail".into()));
        assert_eq!(serve(b"").await, Answer::NotSsh(String::new()));
        let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        assert_eq!(knock(LOOPBACKS[0], closed).await.unwrap(), Answer::Refused);
    }

    #[tokio::test]
    async fn listeners_are_found_on_any_address_with_their_owner() {
        let listener = TcpListener::bind("127.0.0.9:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen = |pid| listeners(address.port(), pid).unwrap();
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
