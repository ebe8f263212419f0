//! `docker-daemon`: Docker itself is configured as the CIS Docker Benchmark asks for.
//!
//! What is in force is Docker's to say, where it says it (its API, and what it truly listens on). What
//! its file and its command line ask for counts besides: that is what it has after the next start. Two
//! things it does not say, the userland proxy and the size of logs: there the file counts, as long as
//! it has not changed since Docker was started.
//!
//! Docker is started by `docker-storage`, which has what is asked for written before ([`start`]), so
//! that a fresh host starts it once. This control comes after it, for the Docker that runs.

use serde::Serialize;

use super::docker_storage;
use crate::config::{Config, Hardening, Migrate};
use crate::control::{About, Context, Control, Fact, Plan, Unknown, Verdict};
use crate::gate;
use crate::host::dockerd::flags::Flag;
use crate::host::dockerd::json::Setting;
use crate::host::dockerd::transaction::Then;
use crate::host::dockerd::{self, AtStart, Door, SERVICE, SOCKET, Written};
use crate::host::engine_api::{self, Bridge, InForce};
use crate::host::processes;
use crate::host::systemd::Unit;
use crate::step::Step;

mod rules;

use rules::{Cure, Found, Seen};

/// See the module.
pub struct DockerDaemon;

/// What is observed.
#[derive(Debug, Serialize)]
pub struct Facts {
    /// Docker's daemon; none where the control is off.
    #[serde(flatten)]
    pub daemon: Option<Daemon>,
}

/// Docker's daemon.
#[derive(Debug, Serialize)]
pub struct Daemon {
    /// `docker.service`
    pub unit: Fact<Unit>,
    /// `docker.socket`
    pub socket: Fact<Unit>,
    /// The flags of the daemon that runs, or else of its next start.
    pub flags: Fact<Vec<Flag>>,
    /// The flags of its next start, if it runs and its unit starts dockerd itself.
    pub next_flags: Fact<Option<Vec<Flag>>>,
    /// Its configuration file.
    pub file: Fact<Written>,
    /// Whether it is part of a swarm, by what it keeps on the disk.
    pub swarm: Fact<bool>,
    /// What it says is in force, if it runs.
    pub in_force: Fact<Option<InForce>>,
    /// Its default bridge, if it runs and has one.
    pub bridge: Fact<Option<Bridge>>,
    /// Where it listens on TCP, if it runs.
    pub doors: Fact<Vec<Door>>,
    /// The containers that run.
    pub containers: Fact<Vec<String>>,
    /// What the gate says: why Docker may start; unknown says why it may not.
    pub gate: Fact<String>,
    /// What the next start of a daemon would keep off the volume, by its unit; none if nothing.
    pub off_volume: Fact<Option<String>>,
}

impl Control for DockerDaemon {
    type Facts = Facts;

    const ABOUT: About = About {
        id: "docker-daemon",
        title: "Docker is configured as the CIS Docker Benchmark asks for",
        why: "Whoever commands Docker is root on this host, and what Docker lets containers do is \
              what stands between one that was broken into and the data of all others.",
        requires: &[],
        // Docker is not restarted before it may start.
        acts_after: &["docker-storage"],
    };

    async fn observe(&self, cx: &Context) -> Facts {
        if cx.config.docker.daemon == Hardening::Off {
            return Facts { daemon: None };
        }
        let (unit, socket) = (unit(cx, SERVICE).await, unit(cx, SOCKET).await);
        let pid = match &unit {
            Ok(unit) if unit.active_state == "active" && unit.main_pid != 0 => {
                Ok(Some(unit.main_pid))
            }
            Ok(unit) if unit.is_up() => Err(format!("{SERVICE} is {}", unit.active_state)),
            Ok(_) => Ok(None),
            Err(e) => Err(format!("{e:#}")),
        };
        let unclear = |why: &String| anyhow::anyhow!(why.clone());
        let flags = match &pid {
            Ok(Some(pid)) => dockerd::flags_of_process(*pid),
            Ok(None) => match cx.host.systemd().await {
                Ok(systemd) => dockerd::flags_of_unit(systemd).await,
                Err(e) => Err(e),
            },
            Err(why) => Err(unclear(why)),
        };
        let next_flags = match (&pid, cx.host.systemd().await) {
            (Ok(Some(_)), Ok(systemd)) => dockerd::flags_at_next_start(systemd).await,
            (Ok(Some(_)), Err(e)) => Err(e),
            (Ok(None), _) => Ok(None),
            (Err(why), _) => Err(unclear(why)),
        };
        let file = match &flags {
            Ok(flags) => dockerd::written(flags),
            Err(e) => Err(anyhow::anyhow!("{e:#}")),
        };
        let swarm = match (&flags, &file) {
            (Ok(flags), Ok(file)) => dockerd::in_swarm(flags, file),
            (Err(e), _) | (_, Err(e)) => Err(anyhow::anyhow!("{e:#}")),
        };
        // Only one that runs is asked: the question would start it.
        let (in_force, bridge, doors) = match &pid {
            Ok(Some(pid)) => {
                tokio::join!(
                    async { engine_api::in_force().await.map(Some) },
                    engine_api::bridge(),
                    dockerd::doors(*pid)
                )
            }
            Ok(None) => (Ok(None), Ok(None), Ok(Vec::new())),
            Err(why) => (Err(unclear(why)), Err(unclear(why)), Err(unclear(why))),
        };
        let api = "Docker's Engine API";
        Facts {
            daemon: Some(Daemon {
                unit: Fact::new("systemd (D-Bus)", unit),
                socket: Fact::new("systemd (D-Bus)", socket),
                flags: Fact::new("/proc/PID/cmdline, or else the unit", flags),
                next_flags: Fact::new("the unit", next_flags),
                file: Fact::new("daemon.json", file),
                swarm: Fact::new("Docker's directory", swarm),
                in_force: Fact::new(format!("{api}, /info"), in_force),
                bridge: Fact::new(format!("{api}, /networks/bridge"), bridge),
                doors: Fact::new("/proc/net/tcp, and asked", doors),
                containers: Fact::new("/proc", processes::containers()),
                gate: Fact::new("hostagent gate", gate::check(&cx.config.volume)),
                off_volume: docker_storage::next_start::off_volume(cx).await,
            }),
        }
    }

    fn judge(&self, config: &Config, facts: &Facts) -> Result<Verdict, Unknown> {
        let Some(daemon) = looked_at(config, facts)? else {
            return Ok(Verdict::NotApplicable { why: "docker.daemon is \"off\"".to_owned() });
        };
        if !daemon.unit.known()?.exists() {
            return Ok(Verdict::NotApplicable { why: "Docker is not installed".to_owned() });
        }
        if let Some(changed) = daemon.changed()? {
            if config.docker.daemon == Hardening::Report {
                return Err(Unknown(changed));
            }
            return Ok(Verdict::fail(
                "systemd has read the files of Docker's units, which count at the next boot",
                changed,
                "run `hostagent provision`, or `systemctl daemon-reload`",
            ));
        }
        let (seen, next) = (daemon.seen()?, daemon.at_next_start()?);
        let (found, unclear) = rules::look_at_both(&seen, next.as_ref());
        let report = config.docker.daemon == Hardening::Report;
        if let (true, Some(why)) = (found.is_empty() || report, unclear.into_iter().next()) {
            return Err(Unknown(why));
        }
        if found.is_empty() {
            return Ok(Verdict::pass(if seen.runs {
                "live-restore, no-new-privileges, seccomp, AppArmor and bounded logs are in force, \
                 no userland proxy, no traffic between containers, no API for everybody"
            } else {
                "Docker does not run; by its files, all that is asked for is so when it starts"
            }));
        }
        let observed = join(found.iter().map(Found::text));
        if report {
            return Ok(Verdict::pass(format!("WARNING: {observed}")));
        }
        Ok(Verdict::fail(
            join(found.iter().map(|found| found.rule.name())),
            observed,
            "run `hostagent provision`; what it refuses, change yourself, or set docker.daemon to \
             \"report\"",
        ))
    }

    fn plan(&self, config: &Config, facts: &Facts) -> Result<Plan, Unknown> {
        if config.docker.daemon != Hardening::Enforce {
            return Ok(Plan::Nothing);
        }
        let Some(daemon) = looked_at(config, facts)? else { return Ok(Plan::Nothing) };
        if !daemon.unit.known()?.exists() {
            return Ok(Plan::Nothing);
        }
        if daemon.changed()?.is_some() {
            // What they say is judged after that.
            return Ok(Plan::steps(vec![Step::ReloadManager]));
        }
        let (seen, next) = (daemon.seen()?, daemon.at_next_start()?);
        let (found, unclear) = rules::look_at_both(&seen, next.as_ref());
        if let (true, Some(why)) = (found.is_empty(), unclear.first()) {
            return Err(Unknown(why.clone()));
        }
        let (settings, mut refused) = (settings(&found), Vec::new());
        refused.extend(found.iter().filter_map(Found::refusal));
        let on_volume = matches!(daemon.off_volume.known(), Ok(None));
        if daemon.gate.known().is_err() || !on_volume {
            // Docker is not to be started where it is, but by `docker-storage`, and with this.
            return Ok(Plan::with_refusals(vec![], &refused));
        }
        let live = settings.iter().any(|setting| setting.key == rules::LIVE_RESTORE);
        let to_renew = |found: &&Found| !matches!(found.cure, Cure::Operator(_));
        let restart = found.iter().filter(to_renew).any(|f| f.rule.key() != rules::LIVE_RESTORE);
        let any = found.iter().any(|found| to_renew(&found));
        let then = if !seen.runs {
            Then::Leave
        } else if !restart {
            Then::Reload
        } else {
            let containers = daemon.containers.known()?;
            if containers.is_empty() || config.docker.migrate == Migrate::Running {
                Then::Restart
            } else {
                refused.push(format!(
                    "Docker takes the rest up only when it is started, and containers run ({}); \
                     stop them and run `hostagent provision`, or set docker.migrate to \"running\"",
                    processes::short(containers)
                ));
                if live { Then::Reload } else { Then::Leave }
            }
        };
        // Written already, and not to be taken up now.
        let idle = settings.is_empty() && then == Then::Leave;
        let steps =
            if any && !idle { vec![Step::ConfigureDocker { settings, then }] } else { vec![] };
        Ok(Plan::with_refusals(steps, &refused))
    }
}

/// What `docker-storage` looks at before it has Docker started; none where that changes nothing.
pub(super) async fn before_start(cx: &Context) -> Fact<Option<AtStart>> {
    let result = match (cx.config.docker.daemon, cx.host.systemd().await) {
        (Hardening::Enforce, Ok(systemd)) => dockerd::at_start(systemd).await,
        (Hardening::Enforce, Err(e)) => Err(e),
        (Hardening::Report | Hardening::Off, _) => Ok(None),
    };
    Fact::new("daemon.json, docker.service", result)
}

/// The step that starts Docker, with what is asked for. What is not known here is not changed: this
/// control says so when Docker runs.
pub(super) fn start(at_start: &Fact<Option<AtStart>>) -> Step {
    if let Ok(Some(AtStart { flags, written, swarm })) = at_start.known() {
        let (found, _) = rules::look(&Seen::at_start(flags, written, *swarm));
        let settings = settings(&found);
        if !settings.is_empty() {
            return Step::ConfigureDocker { settings, then: Then::Start };
        }
    }
    Step::StartUnit { unit: SERVICE.to_owned() }
}

/// All that has to be written.
fn settings(found: &[Found]) -> Vec<Setting> {
    let sets = found.iter().filter_map(|found| match &found.cure {
        Cure::Set(settings) => Some(settings.clone()),
        Cure::Renew | Cure::Operator(_) => None,
    });
    sets.flatten().collect()
}

/// The daemon, unless the control is off.
fn looked_at<'a>(config: &Config, facts: &'a Facts) -> Result<Option<&'a Daemon>, Unknown> {
    match (config.docker.daemon, &facts.daemon) {
        (Hardening::Off, _) => Ok(None),
        (_, Some(daemon)) => Ok(Some(daemon)),
        (_, None) => Err(Unknown("Docker was not looked at".to_owned())),
    }
}

impl Daemon {
    fn seen(&self) -> Result<Seen<'_>, Unknown> {
        let unit = self.unit.known()?;
        let runs = unit.active_state == "active" && unit.main_pid != 0;
        if unit.is_up() && !runs {
            return Err(Unknown(format!("{SERVICE} is {}", unit.active_state)));
        }
        let in_force = self.in_force.known()?.as_ref();
        if runs && in_force.is_none() {
            return Err(Unknown("Docker was not asked what is in force".to_owned()));
        }
        Ok(Seen {
            runs,
            started: unit.main_started,
            flags: self.flags.known()?,
            file: self.file.known()?,
            swarm: *self.swarm.known()? || in_force.is_some_and(|in_force| in_force.swarm),
            listen: &self.socket.known()?.listen,
            in_force,
            bridge: self.bridge.known()?.as_ref(),
            doors: self.doors.known()?,
        })
    }

    /// Which unit's files systemd has not read as they are, if there is one: what a boot makes of them,
    /// where `docker.socket` listens above all, nobody knows.
    fn changed(&self) -> Result<Option<String>, Unknown> {
        for (name, unit) in [(SOCKET, &self.socket), (SERVICE, &self.unit)] {
            if unit.known()?.need_daemon_reload {
                return Ok(Some(format!("the files of {name} changed since systemd read them")));
            }
        }
        Ok(None)
    }

    /// The daemon that its unit would start in place of the one that runs.
    fn at_next_start(&self) -> Result<Option<Seen<'_>>, Unknown> {
        let (flags, file, swarm) =
            (self.next_flags.known()?.as_ref(), self.file.known()?, *self.swarm.known()?);
        Ok(flags.map(|flags| Seen::at_start(flags, file, swarm)))
    }
}

fn join(texts: impl Iterator<Item = String>) -> String {
    texts.collect::<Vec<_>>().join("; ")
}

async fn unit(cx: &Context, name: &str) -> anyhow::Result<Unit> {
    cx.host.systemd().await?.unit(name).await
}

#[cfg(test)]
mod tests;
