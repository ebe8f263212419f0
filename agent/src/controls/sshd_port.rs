//! `sshd-port`: sshd answers on the configured port, and port 22 does not answer.

use std::net::SocketAddr;

use serde::Serialize;

use crate::config::Config;
use crate::control::{About, Context, Control, Fact, Plan, Unknown, Verdict};
use crate::host::sshd::{self, Answer, Effective, LOOPBACKS};
use crate::host::systemd::Unit;
use crate::step::Step;

/// See the module.
pub struct SshdPort;

/// The port that everybody tries.
const WELL_KNOWN: u16 = 22;

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
    /// What listens on port 22, on any address.
    pub port_22: Fact<Vec<SocketAddr>>,
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
        Facts {
            effective: Fact::new("sshd -T", sshd::effective().await),
            service: Fact::new("systemd (D-Bus)", unit(sshd::SERVICE).await),
            socket: Fact::new("systemd (D-Bus)", unit(sshd::SOCKET).await),
            answers,
            port_22: Fact::new("/proc/net/tcp, /proc/net/tcp6", sshd::listeners(WELL_KNOWN)),
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
                Answer::NotSsh(text) => {
                    return fail(format!("what answers on {address} is not sshd: {text:?}"));
                }
                Answer::NoAddressFamily => return fail(format!("{address} cannot be reached")),
            }
        }
        let Some(banner) = banner else { return fail(format!("nothing answers on port {port}")) };
        let on_22 = facts.port_22.known()?;
        if port != WELL_KNOWN && !on_22.is_empty() {
            return fail(format!("{} still listens", on_22[0]));
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
        if facts.effective.known()?.ports == [port]
            && !facts.port_22.known()?.is_empty()
            && port != WELL_KNOWN
        {
            let why = "sshd is configured for its port only, so something else listens on port 22";
            return Ok(Plan::refuse(format!("{why}; see `ss -ltnp sport = 22`")));
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

    fn facts(ports: &[u16], v4: Answer, v6: Answer, on_22: usize) -> Facts {
        let answers = LOOPBACKS
            .into_iter()
            .zip([v4, v6])
            .map(|(ip, answer)| Knock {
                address: SocketAddr::new(ip, 2222),
                answer: Fact::new("t", Ok(answer)),
            })
            .collect();
        Facts {
            effective: Fact::new(
                "t",
                Ok(Effective { ports: ports.to_vec(), address_family: "any".into() }),
            ),
            service: unit("active"),
            socket: unit("inactive"),
            answers,
            port_22: Fact::new("t", Ok(vec!["10.0.0.5:22".parse().unwrap(); on_22])),
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
            Ok(Plan::Refuse { .. }) | Err(_) => "refuse",
        };
        (word, plan)
    }

    #[test]
    fn only_a_banner_in_every_family_and_silence_on_22_pass() {
        let table = [
            (facts(&[2222], banner(), banner(), 0), ("pass", "nothing")),
            (facts(&[2222], banner(), Answer::NoAddressFamily, 0), ("pass", "nothing")),
            (facts(&[22], Answer::Refused, Answer::Refused, 1), ("fail", "move")),
            (facts(&[22, 2222], banner(), banner(), 1), ("fail", "move")),
            (facts(&[22, 2222], banner(), banner(), 0), ("fail", "move")),
            (facts(&[2222], banner(), Answer::Refused, 0), ("fail", "move")),
            (facts(&[2222], Answer::NoAddressFamily, banner(), 0), ("fail", "move")),
            (facts(&[2222], Answer::NotSsh("220".into()), banner(), 0), ("fail", "move")),
            (facts(&[2222], banner(), banner(), 1), ("fail", "refuse")),
        ];
        for (i, (facts, expected)) in table.iter().enumerate() {
            assert_eq!(outcome(facts), *expected, "row {i}");
        }
    }

    #[test]
    fn what_cannot_be_seen_never_passes() {
        let good = || facts(&[2222], banner(), banner(), 0);
        let cases: [fn(&mut Facts); 3] = [
            |f| f.effective = Fact::new("t", Err(anyhow!("x"))),
            |f| f.answers[1].answer = Fact::new("t", Err(anyhow!("x"))),
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
    fn a_socket_or_a_dead_service_is_left_alone() {
        let mut socket = facts(&[22], Answer::Refused, Answer::Refused, 1);
        socket.socket = unit("active");
        assert_eq!(outcome(&socket), ("fail", "refuse"));
        let mut dead = facts(&[22], Answer::Refused, Answer::Refused, 0);
        dead.service = unit("inactive");
        assert_eq!(outcome(&dead), ("fail", "refuse"));
    }

    #[test]
    fn port_22_is_honoured_when_it_is_configured() {
        let mut config = Config::default();
        config.sshd.port = crate::config::Port::try_from(22).unwrap();
        let mut facts = facts(&[22], banner(), banner(), 2);
        for knock in &mut facts.answers {
            knock.address.set_port(22);
        }
        assert_eq!(SshdPort.judge(&config, &facts).unwrap().word(), "pass");
        assert_eq!(SshdPort.plan(&config, &facts), Ok(Plan::Nothing));
    }
}
