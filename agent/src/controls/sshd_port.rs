//! `sshd-port`: sshd answers on the configured port, and port 22 does not answer.

use std::net::SocketAddr;

use serde::Serialize;

use crate::config::Config;
use crate::control::{About, Context, Control, Fact, Plan, Unknown, Verdict};
use crate::host::sshd::{self, Answer, Effective, LOOPBACKS, Listener, WELL_KNOWN};
use crate::host::systemd::Unit;
use crate::step::Step;

/// See the module.
pub struct SshdPort;

/// What is observed.
#[derive(Debug, Serialize)]
pub struct Facts {
    /// sshd's configuration.
    pub effective: Fact<Effective>,
    /// `ssh.service`, as systemd has it loaded.
    pub service: Fact<Unit>,
    /// `ssh.socket`, as systemd has it loaded.
    pub socket: Fact<Unit>,
    /// What answers on the configured port, on the loopback address of each family.
    pub answers: Vec<Knock>,
    /// What listens on the configured port, on any address, and whether it is `ssh.service`.
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
        let systemd = cx.host.systemd().await;
        let unit = async |name| match &systemd {
            Ok(systemd) => systemd.unit(name).await,
            Err(e) => Err(anyhow::anyhow!("{e:#}")),
        };
        let port = cx.config.sshd.port.get();
        let mut answers = Vec::new();
        for address in LOOPBACKS {
            let answer = Fact::new("a TCP connection", sshd::knock(address, port).await);
            answers.push(Knock { address: SocketAddr::new(address, port), answer });
        }
        let service = unit(sshd::SERVICE).await;
        let pid = service.as_ref().map_or(0, |unit| unit.main_pid);
        let sockets = "/proc/net/tcp, /proc/net/tcp6, /proc/PID/fd";
        Facts {
            effective: Fact::new("sshd -T", sshd::effective().await),
            service: Fact::new("systemd (D-Bus)", service),
            socket: Fact::new("systemd (D-Bus)", unit(sshd::SOCKET).await),
            answers,
            listeners: Fact::new(sockets, sshd::listeners(port, pid)),
            port_22: Fact::new(sockets, sshd::listeners(WELL_KNOWN, pid)),
        }
    }

    fn judge(&self, config: &Config, facts: &Facts) -> Result<Verdict, Unknown> {
        let port = config.sshd.port.get();
        let expected = if port == WELL_KNOWN {
            format!("sshd on port {port}")
        } else {
            format!("sshd on port {port}, nothing on port {WELL_KNOWN}")
        };
        let fail = |observed: String| {
            Ok(Verdict::fail(expected.clone(), observed, "run `hostagent provision`"))
        };
        let effective = facts.effective.known()?;
        let service = facts.service.known()?;
        if service.active_state != "active" {
            return fail(format!("ssh.service is {}", service.active_state));
        }
        let listeners = facts.listeners.known()?;
        if let Some(stranger) = listeners.iter().find(|l| !l.owned) {
            return fail(format!("what listens on {} is not ssh.service", stranger.address));
        }
        let mut banner = None;
        for Knock { address, answer } in &facts.answers {
            if !sshd::expected_on(address.ip(), &effective.address_family) {
                continue;
            }
            match answer.known()? {
                Answer::Banner(text) => banner = Some(text),
                // A machine without IPv6 cannot be reached by it.
                Answer::NoAddressFamily if address.is_ipv6() => {}
                Answer::Refused => return fail(format!("nothing listens on {address}")),
                // It holds the port, and turned this peer away before its banner.
                Answer::NotSsh(_) if !listeners.is_empty() => {
                    return Err(Unknown(format!(
                        "sshd holds {address}, but closed the connection before its banner; it may \
                         be penalising a peer that connected often"
                    )));
                }
                Answer::NotSsh(text) => {
                    return fail(format!("what answers on {address} is not sshd: {text:?}"));
                }
                Answer::NoAddressFamily => return fail(format!("{address} cannot be reached")),
            }
        }
        let Some(banner) = banner else { return fail(format!("nothing answers on port {port}")) };
        if listeners.is_empty() {
            return Err(Unknown(format!("who listens on port {port} could not be seen")));
        }
        let on_22 = facts.port_22.known()?;
        if port != WELL_KNOWN && !on_22.is_empty() {
            return fail(format!("{} still listens", on_22[0].address));
        }
        if effective.ports != [port] {
            let ports: Vec<String> = effective.ports.iter().map(ToString::to_string).collect();
            return fail(format!("sshd is configured for the ports {}", ports.join(", ")));
        }
        Ok(Verdict::pass(format!(
            "{banner} on port {port}{}",
            if port == WELL_KNOWN { "" } else { ", nothing on 22" }
        )))
    }

    fn plan(&self, config: &Config, facts: &Facts) -> Result<Plan, Unknown> {
        let verdict = self.judge(config, facts)?;
        if verdict.lets_through() {
            return Ok(Plan::Nothing);
        }
        let port = config.sshd.port.get();
        if facts.socket.known()?.is_up() {
            return Ok(Plan::refuse(
                "ssh.socket listens for sshd on this host; run `systemctl disable --now ssh.socket && \
                 systemctl enable --now ssh.service` first",
            ));
        }
        let service = facts.service.known()?;
        if service.active_state != "active" {
            return Ok(Plan::refuse(format!(
                "ssh.service is {}; a daemon that does not run is not reconfigured",
                service.active_state
            )));
        }
        let strangers = [facts.listeners.known()?, facts.port_22.known()?];
        if let Some(stranger) = strangers.into_iter().flatten().find(|l| !l.owned) {
            let address = stranger.address;
            return Ok(Plan::refuse(format!(
                "something other than sshd listens on {address}; see `ss -ltnp sport = {}`",
                address.port()
            )));
        }
        Ok(Plan::Steps(vec![Step::MoveSshd { port }]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::anyhow;

    fn unit(active: &str) -> Fact<Unit> {
        Fact::new("t", Ok(Unit { active_state: active.into(), ..Unit::default() }))
    }

    fn listening(port: u16, owned: bool) -> Listener {
        Listener { address: SocketAddr::new(LOOPBACKS[0], port), owned }
    }

    /// sshd listens on 2222 if anything answers there, and on 22 if `on_22`.
    fn facts(ports: &[u16], v4: Answer, v6: Answer, on_22: bool) -> Facts {
        let up = v4 != Answer::Refused;
        let answers = LOOPBACKS
            .into_iter()
            .zip([v4, v6])
            .map(|(ip, answer)| Knock {
                address: SocketAddr::new(ip, 2222),
                answer: Fact::new("t", Ok(answer)),
            })
            .collect();
        let list = |on: bool, port| if on { vec![listening(port, true)] } else { vec![] };
        Facts {
            effective: Fact::new(
                "t",
                Ok(Effective { ports: ports.to_vec(), address_family: "any".into() }),
            ),
            service: unit("active"),
            socket: unit("inactive"),
            answers,
            listeners: Fact::new("t", Ok(list(up, 2222))),
            port_22: Fact::new("t", Ok(list(on_22, 22))),
        }
    }

    fn banner() -> Answer {
        Answer::Banner("SSH-2.0-OpenSSH_10.0".into())
    }

    fn outcome(facts: &Facts) -> (&'static str, &'static str) {
        let config = Config::default();
        let word = SshdPort.judge(&config, facts).map_or("unknown", |v| v.word());
        let plan = match SshdPort.plan(&config, facts) {
            Ok(Plan::Nothing) => "nothing",
            Ok(Plan::Steps(steps)) if steps == [Step::MoveSshd { port: 2222 }] => "move",
            Ok(Plan::Steps(steps)) => panic!("{steps:?}"),
            Ok(Plan::Refuse { .. } | Plan::Contain { .. }) | Err(_) => "refuse",
        };
        (word, plan)
    }

    #[test]
    fn only_a_banner_in_every_family_and_silence_on_22_pass() {
        let not_ssh = || Answer::NotSsh("220".into());
        let table = [
            (facts(&[2222], banner(), banner(), false), ("pass", "nothing")),
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
    fn a_stranger_on_a_port_is_not_sshd() {
        let good = || facts(&[2222], banner(), banner(), false);
        let mut stranger = good();
        stranger.listeners =
            Fact::new("t", Ok(vec![listening(2222, true), listening(2222, false)]));
        assert_eq!(outcome(&stranger), ("fail", "refuse"));
        let mut on_22 = good();
        on_22.port_22 = Fact::new("t", Ok(vec![listening(22, false)]));
        assert_eq!(outcome(&on_22), ("fail", "refuse"));
        let mut dead = good();
        dead.service = unit("failed");
        assert_eq!(outcome(&dead), ("fail", "refuse"));
    }

    #[test]
    fn what_cannot_be_seen_never_passes() {
        let good = || facts(&[2222], banner(), banner(), false);
        let cases: [fn(&mut Facts); 6] = [
            |f| f.effective = Fact::new("t", Err(anyhow!("x"))),
            |f| f.service = Fact::new("t", Err(anyhow!("x"))),
            |f| f.answers[1].answer = Fact::new("t", Err(anyhow!("x"))),
            |f| f.listeners = Fact::new("t", Err(anyhow!("x"))),
            |f| f.listeners = Fact::new("t", Ok(vec![])),
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
    }

    #[test]
    fn a_socket_is_left_alone() {
        let mut socket = facts(&[22], Answer::Refused, Answer::Refused, true);
        socket.socket = unit("active");
        assert_eq!(outcome(&socket), ("fail", "refuse"));
    }

    #[test]
    fn port_22_is_honoured_when_it_is_configured() {
        let mut config = Config::default();
        config.sshd.port = crate::config::Port::try_from(22).unwrap();
        let mut facts = facts(&[22], banner(), banner(), true);
        for knock in &mut facts.answers {
            knock.address.set_port(22);
        }
        assert_eq!(SshdPort.judge(&config, &facts).unwrap().word(), "pass");
        assert_eq!(SshdPort.plan(&config, &facts), Ok(Plan::Nothing));
    }
}
