//! `sshd-port`: sshd answers on the configured port, and port 22 does not answer.
//!
//! Whether `ssh.service` or `ssh.socket` listens, now and at the next boot, is systemd's to say; what
//! is judged is what listens, whose it is and what it answers, and besides that every configuration
//! that could be in force after the next boot.

use std::net::SocketAddr;

use serde::Serialize;

use crate::config::Config;
use crate::control::{About, Context, Control, Fact, Plan, Seen, Unknown, Verdict};
use crate::host::sshd::lines::{self, LISTEN_ADDRESS, LISTENING, Line};
use crate::host::sshd::options::{self, Told};
use crate::host::sshd::transaction::Change;
use crate::host::sshd::{
    self, Answer, DROP_IN, Effective, LOOPBACKS, Listener, Owners, SERVICE, SOCKET, WELL_KNOWN,
};
use crate::host::systemd::Unit;
use crate::step::Step;

/// See the module.
pub struct SshdPort;

/// What is observed.
#[derive(Debug, Serialize)]
pub struct Facts {
    /// sshd's configuration.
    pub effective: Fact<Effective>,
    /// The lines of its files, other than ours, that say where it listens.
    pub lines: Fact<Vec<Line>>,
    /// The options of its command line that say where it listens.
    pub options: Fact<Vec<Told>>,
    /// All that the sshd that runs was told, where that is something else than at its next start.
    pub running: Fact<Option<Vec<Told>>>,
    /// `ssh.service`, as systemd has it loaded.
    pub service: Fact<Unit>,
    /// `ssh.socket`, as systemd has it loaded.
    pub socket: Fact<Unit>,
    /// What answers on the configured port, at every address that sshd is configured for.
    pub answers: Vec<Knock>,
    /// What listens on the configured port, on any address, and whether it is sshd's.
    pub listeners: Fact<Vec<Listener>>,
    /// The same for port 22.
    pub port_22: Fact<Vec<Listener>>,
}

/// An address and what answers there.
#[derive(Debug, Serialize)]
pub struct Knock {
    /// The address and port.
    pub address: SocketAddr,
    /// What answers.
    pub answer: Fact<Answer>,
}

impl Control for SshdPort {
    type Facts = Facts;

    const ABOUT: About = About {
        id: "sshd-port",
        title: "sshd answers on its port, and not on 22",
        why: "Port 22 is tried by everybody. The change is proven by a banner, so that it cannot \
              lock the operator out.",
        requires: &[],
        acts_after: &[],
    };

    async fn observe(&self, cx: &Context) -> Facts {
        let unit = async |name| cx.host.systemd().await?.unit(name).await;
        let port = cx.config.sshd.port.get();
        if let Ok(socket) = unit(SOCKET).await {
            sshd::wake(&socket).await;
        }
        let effective = async { sshd::effective(cx.host.systemd().await?).await };
        let effective = Fact::new("sshd -T", effective.await);
        let doors = match &effective.seen {
            Seen::Value(effective) => effective.doors(port),
            Seen::Unknown(_) => LOOPBACKS.map(|ip| SocketAddr::new(ip, port)).to_vec(),
        };
        let mut answers = Vec::new();
        for address in doors {
            let answer = Fact::new("a TCP connection", sshd::knock(address).await);
            answers.push(Knock { address, answer });
        }
        // After the knocks: one of them may have started the service.
        let (service, socket) = (unit(SERVICE).await, unit(SOCKET).await);
        let seen = |port| match (&service, &socket) {
            (Ok(service), Ok(socket)) => sshd::listeners(port, &Owners::of(service, socket)),
            (Err(e), _) | (_, Err(e)) => Err(anyhow::anyhow!("whose they are is unknown: {e:#}")),
        };
        let options = async { options::at_start(cx.host.systemd().await?).await };
        let options = options.await.map(|told| told.into_iter().filter(Told::listens).collect());
        let running = async { options::running(cx.host.systemd().await?).await };
        let running = Fact::new("the command line of sshd", running.await);
        let sockets = "/proc/net/tcp, /proc/net/tcp6, /proc/PID/fd";
        Facts {
            effective,
            lines: Fact::new("sshd_config", lines::elsewhere(DROP_IN, &LISTENING)),
            options: Fact::new("the command line in ssh.service", options),
            running,
            answers,
            listeners: Fact::new(sockets, seen(port)),
            port_22: Fact::new(sockets, seen(WELL_KNOWN)),
            service: Fact::new("systemd (D-Bus)", service),
            socket: Fact::new("systemd (D-Bus)", socket),
        }
    }

    fn judge(&self, config: &Config, facts: &Facts) -> Result<Verdict, Unknown> {
        let port = config.sshd.port.get();
        let expected = if port == WELL_KNOWN {
            format!("sshd on port {port}")
        } else {
            format!("sshd on port {port}, nothing on port {WELL_KNOWN}")
        };
        if by_connection(facts)? {
            return Ok(Verdict::fail(expected, BY_CONNECTION, BY_SERVICE));
        }
        if let Some(observed) = wrong_now(port, facts)? {
            return Ok(Verdict::fail(expected, observed, "run `hostagent provision`"));
        }
        if let Some(observed) = wrong_at_boot(port, facts)? {
            let expected = format!("{expected}, also after the next boot");
            return Ok(Verdict::fail(expected, observed, "run `hostagent provision`"));
        }
        if !comes_at_boot(facts)? {
            return Ok(Verdict::fail(expected, NOT_ENABLED, ENABLE));
        }
        let by = if facts.socket.known()?.is_up() { " by ssh.socket" } else { "" };
        let none = if port == WELL_KNOWN { "" } else { ", nothing on 22" };
        Ok(Verdict::pass(format!("{} on port {port}{by}{none}", banner(facts).unwrap_or_default())))
    }

    fn plan(&self, config: &Config, facts: &Facts) -> Result<Plan, Unknown> {
        let port = config.sshd.port.get();
        if by_connection(facts)? {
            return Ok(Plan::refuse(format!("{BY_CONNECTION}: {BY_SERVICE}")));
        }
        let (service, socket) = (facts.service.known()?, facts.socket.known()?);
        if !socket.is_up() && service.active_state != "active" {
            return Ok(match [socket, service].map(sshd::comes) {
                [true, _] => start(SOCKET),
                [_, true] if !service.is_up() => start(SERVICE),
                _ => Plan::refuse(format!(
                    "ssh.service is {}; what does not run is not reconfigured",
                    service.active_state
                )),
            });
        }
        let not_enabled =
            if comes_at_boot(facts)? { vec![] } else { vec![format!("{NOT_ENABLED}: {ENABLE}")] };
        if wrong_now(port, facts)?.is_none() && wrong_at_boot(port, facts)?.is_none() {
            return Ok(Plan::with_refusals(vec![], &not_enabled));
        }
        let strangers = [facts.listeners.known()?, facts.port_22.known()?];
        if let Some(stranger) = strangers.into_iter().flatten().find(|l| !l.owned) {
            let address = stranger.address;
            return Ok(Plan::refuse(format!(
                "something other than sshd listens on {address}; see `ss -ltnp sport = {}`",
                address.port()
            )));
        }
        let told = facts.options.known()?;
        if !told.is_empty() {
            return Ok(Plan::refuse(format!(
                "sshd is told where to listen on its command line, which outdoes its files: take \
                 {} out of {}, and restart ssh.service",
                options::list(told),
                options::WHERE
            )));
        }
        // A reload keeps its command line.
        if let Some(told) = facts.running.known()? {
            return Ok(Plan::refuse(options::runs_otherwise(told)));
        }
        let change = change(port, facts.effective.known()?, facts.lines.known()?);
        Ok(Plan::with_refusals(vec![Step::MoveSshd { change }], &not_enabled))
    }
}

const BY_CONNECTION: &str =
    "ssh.socket starts an sshd for each connection (Accept=yes), which is not supported";
const BY_SERVICE: &str =
    "run `systemctl disable --now ssh.socket`, and then `systemctl enable --now ssh.service`";

/// Whether `ssh.socket`, now or at the next boot, gives each connection a service of its own (Ubuntu
/// 22.04's does). There `/run/sshd`, without which no sshd says what is in effect, goes with whichever
/// connection ends, so that nothing could be relied on.
fn by_connection(facts: &Facts) -> Result<bool, Unknown> {
    let socket = facts.socket.known()?;
    Ok(socket.accept && (socket.is_up() || sshd::comes(socket)))
}

const NOT_ENABLED: &str = "neither ssh.service nor ssh.socket is started at the next boot";
const ENABLE: &str = "run `systemctl enable` for the one that you want";

fn start(unit: &str) -> Plan {
    Plan::Steps(vec![Step::StartUnit { unit: unit.to_owned() }])
}

/// What is wrong with what listens and answers.
fn wrong_now(port: u16, facts: &Facts) -> Result<Option<String>, Unknown> {
    let (service, socket) = (facts.service.known()?, facts.socket.known()?);
    if !socket.is_up() && service.active_state != "active" {
        return Ok(Some(format!("ssh.service is {}", service.active_state)));
    }
    let listeners = facts.listeners.known()?;
    if let Some(stranger) = listeners.iter().find(|l| !l.owned) {
        return Ok(Some(format!("what listens on {} is not sshd", stranger.address)));
    }
    facts.effective.known()?;
    for Knock { address, answer } in &facts.answers {
        match answer.known()? {
            Answer::Banner(_) => {}
            // A machine without IPv6 cannot be reached by it.
            Answer::NoAddressFamily if address.ip() == LOOPBACKS[1] => {}
            Answer::Refused => return Ok(Some(format!("nothing listens on {address}"))),
            // It holds the port, and turned this peer away before its banner.
            Answer::NotSsh(_) if !listeners.is_empty() => {
                return Err(Unknown(format!(
                    "sshd holds {address}, but closed the connection before its banner; it may \
                     be penalising a peer that connected often"
                )));
            }
            Answer::NotSsh(text) => {
                return Ok(Some(format!("what answers on {address} is not sshd: {text:?}")));
            }
            Answer::NoAddressFamily => {
                return Ok(Some(format!("{address} cannot be reached")));
            }
        }
    }
    if banner(facts).is_none() {
        return Ok(Some(format!("nothing answers on port {port}")));
    }
    if listeners.is_empty() {
        return Err(Unknown(format!("who listens on port {port} could not be seen")));
    }
    let on_22 = facts.port_22.known()?;
    if port != WELL_KNOWN && !on_22.is_empty() {
        return Ok(Some(format!("{} still listens", on_22[0].address)));
    }
    Ok(None)
}

fn banner(facts: &Facts) -> Option<&str> {
    facts.answers.iter().find_map(|knock| match knock.answer.known() {
        Ok(Answer::Banner(text)) => Some(text.as_str()),
        _ => None,
    })
}

/// What would be wrong after the next boot, whichever of the two units listens then.
fn wrong_at_boot(port: u16, facts: &Facts) -> Result<Option<String>, Unknown> {
    let other = |ports: &[u16]| {
        let ports: Vec<String> = ports.iter().map(ToString::to_string).collect();
        if ports.is_empty() { "no port".to_owned() } else { format!("port {}", ports.join(", ")) }
    };
    let ports = facts.effective.known()?.ports();
    if ports != [port] {
        let told = facts.options.known()?;
        let by = if told.is_empty() {
            String::new()
        } else {
            format!(", by {} in {}", options::list(told), options::WHERE)
        };
        return Ok(Some(format!("sshd is configured for {}{by}", other(&ports))));
    }
    let socket = facts.socket.known()?;
    if !socket.is_up() && !sshd::comes(socket) {
        return Ok(None);
    }
    if socket.need_daemon_reload {
        return Ok(Some("the files of ssh.socket changed since systemd read them".to_owned()));
    }
    let ports = sshd::ports(&sshd::tcp(socket));
    if ports != [port] {
        return Ok(Some(format!("ssh.socket is configured for {}", other(&ports))));
    }
    Ok(None)
}

fn comes_at_boot(facts: &Facts) -> Result<bool, Unknown> {
    Ok(sshd::comes(facts.service.known()?) || sshd::comes(facts.socket.known()?))
}

/// The change that moves sshd to `port` alone, with as little of others' files changed as possible.
///
/// Ports add up over all files. A `Port` elsewhere counts only for addresses without one: where
/// nobody names an address, ours name both families with the port, and the other file stays as it is.
/// Where somebody does, that is a restriction of his, to which nothing may be added: then the lines
/// that name another port are set aside.
fn change(port: u16, effective: &Effective, lines: &[Line]) -> Change {
    let text = port.to_string();
    let other = |line: &&Line| line.port().is_some_and(|other| other != text);
    let edits = lines.iter().filter(other).map(Line::without_port).collect::<Vec<_>>();
    if lines.iter().any(|line| line.keyword == LISTEN_ADDRESS) {
        return Change { port, addresses: Vec::new(), edits };
    }
    let mut addresses = Vec::new();
    if !edits.is_empty() {
        addresses = effective.listen.iter().map(SocketAddr::ip).collect();
        addresses.sort_unstable();
        addresses.dedup();
    }
    Change { port, addresses, edits: Vec::new() }
}

#[cfg(test)]
mod tests;
