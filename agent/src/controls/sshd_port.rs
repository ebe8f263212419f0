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
mod tests {
    use super::*;
    use anyhow::anyhow;
    use std::path::PathBuf;

    fn known<T>(value: T) -> Fact<T> {
        Fact::new("t", Ok(value))
    }

    fn unit(active: &str, file: &str) -> Unit {
        Unit {
            load_state: "loaded".into(),
            active_state: active.into(),
            unit_file_state: file.into(),
            ..Unit::default()
        }
    }

    /// `ssh.socket` on these ports, in both families.
    fn socket(active: &str, file: &str, ports: &[u16]) -> Fact<Unit> {
        let listen =
            ports.iter().flat_map(|port| [format!("0.0.0.0:{port}"), format!("[::]:{port}")]);
        known(Unit { listen: listen.collect(), ..unit(active, file) })
    }

    fn listening(port: u16, owned: bool) -> Listener {
        Listener { address: SocketAddr::new(LOOPBACKS[0], port), owned }
    }

    fn effective(addresses: &[&str]) -> Effective {
        Effective { listen: addresses.iter().map(|text| text.parse().unwrap()).collect() }
    }

    /// sshd listens on 2222 if anything answers there, and on 22 if `on_22`.
    fn facts(ports: &[u16], v4: Answer, v6: Answer, on_22: bool) -> Facts {
        let up = v4 != Answer::Refused;
        let answers = LOOPBACKS
            .into_iter()
            .zip([v4, v6])
            .map(|(ip, answer)| Knock { address: SocketAddr::new(ip, 2222), answer: known(answer) })
            .collect();
        let list = |on: bool, port| if on { vec![listening(port, true)] } else { vec![] };
        let any = ports.iter().flat_map(|port| [format!("[::]:{port}"), format!("0.0.0.0:{port}")]);
        let any: Vec<String> = any.collect();
        Facts {
            effective: known(effective(&any.iter().map(|text| &**text).collect::<Vec<_>>())),
            lines: known(vec![]),
            options: known(vec![]),
            running: known(None),
            service: known(unit("active", "enabled")),
            socket: socket("inactive", "disabled", &[22]),
            answers,
            listeners: known(list(up, 2222)),
            port_22: known(list(on_22, 22)),
        }
    }

    fn banner() -> Answer {
        Answer::Banner("SSH-2.0-OpenSSH_10.0".into())
    }

    fn good() -> Facts {
        facts(&[2222], banner(), banner(), false)
    }

    fn outcome(facts: &Facts) -> (&'static str, &'static str) {
        let config = Config::default();
        let word = SshdPort.judge(&config, facts).map_or("unknown", |v| v.word());
        let plan = match SshdPort.plan(&config, facts) {
            Ok(Plan::Nothing) => "nothing",
            Ok(Plan::Steps(steps)) => match &steps[..] {
                [Step::MoveSshd { change }] if change.port == 2222 => "move",
                [Step::StartUnit { .. }] => "start",
                _ => panic!("{steps:?}"),
            },
            Ok(Plan::Contain { .. }) => "move and refuse",
            Ok(Plan::Refuse { .. }) | Err(_) => "refuse",
        };
        (word, plan)
    }

    #[test]
    fn only_a_banner_in_every_family_and_silence_on_22_pass() {
        let not_ssh = || Answer::NotSsh("220".into());
        let table = [
            (good(), ("pass", "nothing")),
            (facts(&[2222], banner(), Answer::NoAddressFamily, false), ("pass", "nothing")),
            (facts(&[22], Answer::Refused, Answer::Refused, true), ("fail", "move")),
            (facts(&[22, 2222], banner(), banner(), true), ("fail", "move")),
            (facts(&[22, 2222], banner(), banner(), false), ("fail", "move")),
            (facts(&[2222], banner(), Answer::Refused, false), ("fail", "move")),
            (facts(&[2222], Answer::NoAddressFamily, banner(), false), ("fail", "move")),
            // Configured, and never reloaded: what listens counts.
            (facts(&[2222], Answer::Refused, Answer::Refused, true), ("fail", "move")),
            (facts(&[2222], banner(), banner(), true), ("fail", "move")),
            (facts(&[2222], not_ssh(), banner(), false), ("unknown", "refuse")),
        ];
        for (i, (facts, expected)) in table.iter().enumerate() {
            assert_eq!(outcome(facts), *expected, "row {i}");
        }
    }

    #[test]
    fn the_socket_counts_where_it_listens_now_or_after_the_next_boot() {
        let with =
            |service: Unit, socket: Fact<Unit>| Facts { service: known(service), socket, ..good() };
        let idle = || unit("inactive", "disabled");
        let table = [
            // Nobody has connected yet, or somebody has.
            (with(idle(), socket("active", "enabled", &[2222])), ("pass", "nothing")),
            (
                with(unit("active", "disabled"), socket("active", "enabled", &[2222])),
                ("pass", "nothing"),
            ),
            // What it will listen on is not what it listens on.
            (with(idle(), socket("active", "enabled", &[22])), ("fail", "move")),
            (with(idle(), socket("active", "enabled", &[22, 2222])), ("fail", "move")),
            (with(idle(), socket("active", "enabled", &[])), ("fail", "move")),
            (
                with(unit("active", "disabled"), socket("inactive", "enabled", &[22])),
                ("fail", "move"),
            ),
            (
                with(unit("active", "enabled"), socket("inactive", "disabled", &[22])),
                ("pass", "nothing"),
            ),
            // Neither comes back.
            (with(idle(), socket("active", "disabled", &[2222])), ("fail", "refuse")),
            (
                with(unit("active", "disabled"), socket("inactive", "disabled", &[22])),
                ("fail", "refuse"),
            ),
            // Neither is there; what the next boot would start is started.
            (with(idle(), socket("failed", "enabled", &[2222])), ("fail", "start")),
            (
                with(unit("failed", "enabled"), socket("inactive", "disabled", &[22])),
                ("fail", "start"),
            ),
            (
                with(unit("reloading", "enabled"), socket("inactive", "disabled", &[])),
                ("fail", "refuse"),
            ),
            (with(idle(), socket("inactive", "disabled", &[22])), ("fail", "refuse")),
        ];
        for (i, (facts, expected)) in table.iter().enumerate() {
            assert_eq!(outcome(facts), *expected, "row {i}");
        }
        let mut stale = with(idle(), socket("active", "enabled", &[2222]));
        let unit = stale.socket.known().unwrap().clone();
        stale.socket = known(Unit { need_daemon_reload: true, ..unit });
        assert_eq!(outcome(&stale), ("fail", "move"));
        let mut both = facts(&[22], Answer::Refused, Answer::Refused, true);
        both.service = known(super::tests::unit("active", "disabled"));
        assert_eq!(outcome(&both), ("fail", "move and refuse"));
    }

    #[test]
    fn a_process_for_each_connection_is_refused_wherever_it_listens() {
        let accepting = |active: &str, file: &str, ports: &[u16]| {
            let mut facts = good();
            let Ok(socket) = socket(active, file, ports).known().cloned() else { unreachable!() };
            facts.socket = known(Unit { accept: true, ..socket });
            outcome(&facts)
        };
        assert_eq!(accepting("active", "enabled", &[22]), ("fail", "refuse"));
        assert_eq!(accepting("active", "enabled", &[2222]), ("fail", "refuse"));
        assert_eq!(accepting("active", "disabled", &[2222]), ("fail", "refuse"));
        assert_eq!(accepting("inactive", "enabled", &[2222]), ("fail", "refuse"));
        // As Ubuntu 22.04 ships it.
        assert_eq!(accepting("inactive", "disabled", &[22]), ("pass", "nothing"));
    }

    #[test]
    fn what_outdoes_sshds_files_is_refused_unless_it_says_the_same() {
        let told = |facts: Facts| {
            let told = Told { flag: 'p', value: "22".into() };
            outcome(&Facts { options: known(vec![told]), ..facts })
        };
        assert_eq!(told(facts(&[22], Answer::Refused, Answer::Refused, true)), ("fail", "refuse"));
        assert_eq!(told(facts(&[22], banner(), banner(), false)), ("fail", "refuse"));
        assert_eq!(told(good()), ("pass", "nothing"));
        // What runs was told otherwise: a reload would not help.
        let wrong = facts(&[22], Answer::Refused, Answer::Refused, true);
        let running = known(Some(vec![Told { flag: 'p', value: "22".into() }]));
        assert_eq!(outcome(&Facts { running, ..wrong }), ("fail", "refuse"));
        let unread = Fact::new("t", Err(anyhow!("unreadable")));
        let wrong = facts(&[22], Answer::Refused, Answer::Refused, true);
        assert_eq!(outcome(&Facts { options: unread, ..wrong }), ("fail", "refuse"));
    }

    #[test]
    fn a_stranger_on_a_port_is_not_sshd() {
        let mut stranger = good();
        stranger.listeners = known(vec![listening(2222, true), listening(2222, false)]);
        assert_eq!(outcome(&stranger), ("fail", "refuse"));
        let mut on_22 = good();
        on_22.port_22 = known(vec![listening(22, false)]);
        assert_eq!(outcome(&on_22), ("fail", "refuse"));
    }

    #[test]
    fn what_cannot_be_seen_never_passes() {
        let cases: [fn(&mut Facts); 7] = [
            |f| f.effective = Fact::new("t", Err(anyhow!("x"))),
            |f| f.service = Fact::new("t", Err(anyhow!("x"))),
            |f| f.socket = Fact::new("t", Err(anyhow!("x"))),
            |f| f.answers[1].answer = Fact::new("t", Err(anyhow!("x"))),
            |f| f.listeners = Fact::new("t", Err(anyhow!("x"))),
            |f| f.listeners = known(vec![]),
            |f| f.port_22 = Fact::new("t", Err(anyhow!("x"))),
        ];
        for (i, hide) in cases.into_iter().enumerate() {
            let mut facts = good();
            hide(&mut facts);
            assert_eq!(outcome(&facts), ("unknown", "refuse"), "case {i}");
        }
        let mut none = good();
        none.answers.clear();
        assert_eq!(outcome(&none).0, "fail");
        // What the files say is needed to change them, and for nothing else.
        let mut lines = facts(&[22], Answer::Refused, Answer::Refused, true);
        lines.lines = Fact::new("t", Err(anyhow!("x")));
        assert_eq!(outcome(&lines), ("fail", "refuse"));
        lines = Facts { lines: lines.lines, ..good() };
        assert_eq!(outcome(&lines), ("pass", "nothing"));
    }

    #[test]
    fn as_little_as_possible_of_others_files_is_changed() {
        let line = |number, keyword: &str, text: &str| Line {
            file: PathBuf::from("/etc/ssh/sshd_config"),
            number,
            text: text.to_owned(),
            keyword: keyword.to_owned(),
            conditional: false,
            value: text.split(' ').skip(1).map(str::to_owned).collect(),
        };
        let port = |value: &str| line(1, "port", &format!("Port {value}"));
        let address = |value: &str| line(2, LISTEN_ADDRESS, &format!("ListenAddress {value}"));
        let any = effective(&["[::]:22", "0.0.0.0:22"]);
        let plan = |effective: &Effective, lines: &[Line]| {
            let change = change(2222, effective, lines);
            let addresses = change.addresses.iter().map(ToString::to_string).collect::<Vec<_>>();
            let edits =
                change.edits.iter().map(|e| (e.number, e.becomes.clone())).collect::<Vec<_>>();
            (addresses, edits)
        };
        let none = || (vec![], vec![]);
        assert_eq!(plan(&any, &[]), none());
        assert_eq!(plan(&any, &[port("2222")]), none());
        // Nobody names an address: ours outdo the port, and the file stays.
        let both = || vec!["0.0.0.0".to_owned(), "::".to_owned()];
        assert_eq!(plan(&any, &[port("22")]), (both(), vec![]));
        assert_eq!(plan(&any, &[port("22"), port("2222")]), (both(), vec![]));
        let v4 = effective(&["0.0.0.0:22"]);
        assert_eq!(plan(&v4, &[port("22")]), (vec!["0.0.0.0".to_owned()], vec![]));
        // Somebody names one: it stays the only one.
        let bound = effective(&["10.0.0.5:22"]);
        assert_eq!(plan(&bound, &[address("10.0.0.5")]), none());
        assert_eq!(plan(&bound, &[address("10.0.0.5:2222")]), none());
        let kept = Some("ListenAddress 10.0.0.5".to_owned());
        assert_eq!(plan(&bound, &[address("10.0.0.5:22")]), (vec![], vec![(2, kept.clone())]));
        let two = [port("22"), address("10.0.0.5:22")];
        assert_eq!(plan(&bound, &two), (vec![], vec![(1, None), (2, kept)]));
        assert_eq!(plan(&bound, &[port("22"), address("10.0.0.5")]), (vec![], vec![(1, None)]));
    }

    #[test]
    fn an_address_of_its_own_is_where_sshd_must_answer() {
        let mut bound = good();
        bound.effective = known(effective(&["10.0.0.5:2222"]));
        bound.answers =
            vec![Knock { address: "10.0.0.5:2222".parse().unwrap(), answer: known(banner()) }];
        assert_eq!(outcome(&bound), ("pass", "nothing"));
        // An address that is not this machine's is not a family that it lacks.
        bound.answers.push(Knock {
            address: "[fd00::5]:2222".parse().unwrap(),
            answer: known(Answer::NoAddressFamily),
        });
        assert_eq!(outcome(&bound), ("fail", "move"));
    }

    #[test]
    fn port_22_is_honoured_when_it_is_configured() {
        let mut config = Config::default();
        config.sshd.port = crate::config::Port::try_from(22).unwrap();
        let mut facts = facts(&[22], banner(), banner(), true);
        facts.socket = socket("active", "enabled", &[22]);
        for knock in &mut facts.answers {
            knock.address.set_port(22);
        }
        assert_eq!(SshdPort.judge(&config, &facts).unwrap().word(), "pass");
        assert_eq!(SshdPort.plan(&config, &facts), Ok(Plan::Nothing));
    }
}
