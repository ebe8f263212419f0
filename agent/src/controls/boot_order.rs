//! `boot-order`: Docker and containerd start only behind their storage and the gate, by what systemd
//! has loaded, and nothing of them runs that the gate would not let start.

use std::path::Path;

use serde::Serialize;

use crate::config::{Config, Migrate};
use crate::control::{About, Context, Control, Fact, Plan, Unknown, Verdict};
use crate::gate::{self, STORAGE};
use crate::host::docker::{self, Storage};
use crate::host::systemd::Unit;
use crate::host::{mounts, processes};
use crate::step::{DOCKER_UNITS, Step};

/// See the module.
pub struct BootOrder;

/// What is observed.
#[derive(Debug, Serialize)]
pub struct Facts {
    /// The units, as systemd has them loaded.
    pub units: Vec<NamedUnit>,
    /// What the gate says now: why Docker may run; unknown says why it may not.
    pub gate: Fact<String>,
    /// Data that Docker has on the root disk, where nothing is mounted yet; looked for only while the
    /// gate is closed.
    pub data: Fact<Option<String>>,
    /// The containers that run, with Docker or without it (live-restore); looked for only then, too.
    pub containers: Fact<Vec<String>>,
}

/// A unit and its name.
#[derive(Debug, Serialize)]
pub struct NamedUnit {
    /// The name.
    pub name: &'static str,
    /// The unit.
    pub unit: Fact<Unit>,
}

const AGENT: &str = "hostagent.service";

/// What hostagent's own unit must not wait for: user-data, which may be what started it.
const NOT_AFTER: [&str; 3] = ["cloud-final.service", "cloud-init.target", "multi-user.target"];

/// The command line of the gate in the drop-ins.
const GATE: [&str; 2] = ["/usr/bin/hostagent", "gate"];

impl Control for BootOrder {
    type Facts = Facts;

    const ABOUT: About = About {
        id: "boot-order",
        title: "Docker starts only behind its storage",
        why: "Started before the volume is mounted, Docker would write patient data to the root \
              disk. Read from what systemd has loaded: unit files on disk may not be in force.",
        requires: &[],
        acts_after: &[],
    };

    async fn observe(&self, cx: &Context) -> Facts {
        let systemd = cx.host.systemd().await;
        let mut units = Vec::new();
        for name in DOCKER_UNITS.into_iter().chain([AGENT]) {
            let unit = match &systemd {
                Ok(systemd) => systemd.unit(name).await,
                Err(e) => Err(anyhow::anyhow!("{e:#}")),
            };
            units.push(NamedUnit { name, unit: Fact::new("systemd (D-Bus)", unit) });
        }
        let gate = gate::check(&cx.config.volume);
        let (data, containers) = match &gate {
            Ok(_) => (Ok(None), Ok(Vec::new())),
            Err(_) => (data_on_the_root_disk(), processes::containers()),
        };
        Facts {
            units,
            gate: Fact::new("hostagent gate", gate),
            data: Fact::new("/var/lib", data),
            containers: Fact::new("/proc", containers),
        }
    }

    fn judge(&self, config: &Config, facts: &Facts) -> Result<Verdict, Unknown> {
        let (mut guarded, mut left) = (Vec::new(), None);
        for NamedUnit { name, unit } in &facts.units {
            let unit = unit.known()?;
            if *name == AGENT {
                if let Some(wrong) = agent_is_wrong(unit) {
                    return Ok(Verdict::fail(
                        "hostagent.service enabled, and not ordered after user-data",
                        wrong,
                        "install the package, and run `systemctl enable hostagent.service`",
                    ));
                }
                continue;
            }
            if name.ends_with(".service") && startable(unit) {
                if let Some(wrong) = unguarded(unit) {
                    return Ok(Verdict::fail(
                        format!(
                            "{name} starts only after its storage is mounted and `hostagent gate` agrees"
                        ),
                        format!("{name} {wrong}"),
                        format!(
                            "see `systemctl cat {name}` for what overrides \
                             /usr/lib/systemd/system/{name}.d/10-hostagent.conf"
                        ),
                    ));
                }
                guarded.push(*name);
            }
            if let (true, Err(Unknown(why))) = (runs(name, unit), facts.gate.known()) {
                left = stays(config, facts)?;
                if left.is_some() {
                    continue;
                }
                let remedy = match facts.containers.known() {
                    Ok(containers) if !containers.is_empty() && !stops_containers(config) => {
                        format!(
                            "stop the containers ({}), and run `hostagent provision`, which stops Docker",
                            processes::short(containers)
                        )
                    }
                    _ => "run `hostagent provision`, which stops it".to_owned(),
                };
                return Ok(Verdict::fail(
                    EXPECTED,
                    format!("{name} is {}, and the gate says: {why}", unit.active_state),
                    remedy,
                ));
            }
        }
        if let Err(Unknown(why)) = facts.gate.known()
            && left.is_none()
            && let containers = facts.containers.known()?
            && !containers.is_empty()
        {
            left = stays(config, facts)?;
            if left.is_none() {
                let containers = processes::short(containers);
                return Ok(Verdict::fail(
                    EXPECTED,
                    format!("containers run ({containers}), and the gate says: {why}"),
                    if stops_containers(config) {
                        "run `hostagent provision`, which stops them"
                    } else {
                        processes::TO_STOP
                    },
                ));
            }
        }
        if guarded.is_empty() {
            let why = "neither docker.service nor containerd.service can start on this host; the \
                       drop-ins of the package wait for them";
            return Ok(Verdict::NotApplicable { why: why.into() });
        }
        let guarded = guarded.join(" and ");
        let observed = format!("{guarded} start behind the mounts and the gate");
        if let Some(data) = left {
            // That the host is not ready is said by docker-storage.
            return Ok(Verdict::pass(format!(
                "{observed}; what runs from before is left to docker-storage, because its data \
                 ({data}) has to be moved"
            )));
        }
        Ok(Verdict::pass(observed))
    }

    fn plan(&self, config: &Config, facts: &Facts) -> Result<Plan, Unknown> {
        let mut steps = Vec::new();
        for NamedUnit { unit, .. } in &facts.units {
            if unit.known()?.need_daemon_reload && steps.is_empty() {
                steps.push(Step::ReloadManager);
            }
        }
        let mut refused = Vec::new();
        if facts.gate.known().is_err() {
            let mut something = false;
            for NamedUnit { name, unit } in &facts.units {
                something |= *name != AGENT && runs(name, unit.known()?);
            }
            // Where they cannot be looked for, what can be stopped is, and the step looks again.
            let containers = facts.containers.known().map_or(&[][..], Vec::as_slice);
            if (something || !containers.is_empty()) && stays(config, facts)?.is_none() {
                if something || stops_containers(config) {
                    steps.push(Step::StopDocker);
                } else {
                    let containers = processes::short(containers);
                    refused.push(format!("containers run ({containers}); {}", processes::TO_STOP));
                }
            }
        }
        Ok(Plan::with_refusals(steps, &refused))
    }
}

const EXPECTED: &str = "nothing of Docker's runs that the gate would not let start";

/// Whether containers may be stopped.
fn stops_containers(config: &Config) -> bool {
    config.docker.migrate == Migrate::Running
}

/// The data for the sake of which a Docker that runs off the volume is not stopped here: whether it
/// can be moved is decided, before anything stops, by docker-storage.
fn stays<'a>(config: &Config, facts: &'a Facts) -> Result<Option<&'a str>, Unknown> {
    if facts.gate.known().is_ok() || config.docker.migrate == Migrate::Never {
        return Ok(None);
    }
    Ok(facts.data.known()?.as_deref())
}

fn data_on_the_root_disk() -> anyhow::Result<Option<String>> {
    for (path, _) in STORAGE {
        let path = Path::new(path);
        if mounts::at(path)?.is_empty()
            && let Storage::Used(what) = docker::storage_behind(path)?
        {
            return Ok(Some(what));
        }
    }
    Ok(None)
}

/// Whether systemd could start the unit at all.
fn startable(unit: &Unit) -> bool {
    !matches!(unit.load_state.as_str(), "not-found" | "masked")
}

/// Whether something of the unit runs. A service that systemd is about to try again does not.
fn runs(name: &str, unit: &Unit) -> bool {
    unit.is_up() && (name.ends_with(".socket") || unit.main_pid != 0)
}

/// Why the unit could start on the wrong disk, if it could.
fn unguarded(unit: &Unit) -> Option<String> {
    if unit.load_state != "loaded" {
        return Some(format!("has the load state {}", unit.load_state));
    }
    if unit.need_daemon_reload {
        return Some("was changed on disk since systemd loaded it".into());
    }
    for (path, _) in STORAGE {
        if !unit.requires_mounts_for.iter().any(|p| p == path) {
            return Some(format!("does not require the mount of {path}"));
        }
    }
    let gate = unit.exec_start_pre.iter().find(|command| command.argv == GATE);
    match gate {
        None => Some(format!("does not run `{}` before it starts", GATE.join(" "))),
        Some(command) if command.ignore_failure => Some("ignores what the gate says".into()),
        Some(_) => None,
    }
}

fn agent_is_wrong(unit: &Unit) -> Option<String> {
    if !unit.exists() {
        return Some("hostagent.service is not installed".into());
    }
    if unit.unit_file_state != "enabled" {
        return Some(format!("hostagent.service is {}", unit.unit_file_state));
    }
    NOT_AFTER
        .iter()
        .find(|name| unit.after.iter().any(|after| after == **name))
        .map(|name| format!("hostagent.service is ordered after {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::systemd::ExecCommand;
    use anyhow::anyhow;

    fn service(active: &str) -> Unit {
        Unit {
            load_state: "loaded".into(),
            active_state: active.into(),
            unit_file_state: "enabled".into(),
            main_pid: u32::from(active != "inactive") * 7,
            requires_mounts_for: STORAGE.map(|(path, _)| path.to_owned()).to_vec(),
            exec_start_pre: vec![ExecCommand {
                argv: GATE.map(str::to_owned).to_vec(),
                ignore_failure: false,
            }],
            ..Unit::default()
        }
    }

    fn facts(active: &str, gate: bool) -> Facts {
        let gate = gate.then(String::new).ok_or(anyhow!("nothing is mounted on /data"));
        let unit = |name| NamedUnit { name, unit: Fact::new("t", Ok(service(active))) };
        Facts {
            units: DOCKER_UNITS.into_iter().chain([AGENT]).map(unit).collect(),
            gate: Fact::new("t", gate),
            data: Fact::new("t", Ok(None)),
            containers: Fact::new("t", Ok(vec![])),
        }
    }

    const OPEN: bool = true;
    const CLOSED: bool = false;

    fn word(facts: &Facts) -> &'static str {
        BootOrder.judge(&Config::default(), facts).map_or("unknown", |v| v.word())
    }

    fn change(facts: &mut Facts, index: usize, change: impl FnOnce(&mut Unit)) {
        let mut unit = facts.units[index].unit.known().unwrap().clone();
        change(&mut unit);
        facts.units[index].unit = Fact::new("t", Ok(unit));
    }

    #[test]
    fn docker_may_run_only_while_the_gate_is_open() {
        assert_eq!(word(&facts("active", OPEN)), "pass");
        assert_eq!(word(&facts("inactive", CLOSED)), "pass");
        assert_eq!(word(&facts("active", CLOSED)), "fail");
        assert_eq!(word(&facts("activating", CLOSED)), "fail");
    }

    #[test]
    fn what_runs_against_the_gate_is_stopped() {
        let plan = BootOrder.plan(&Config::default(), &facts("active", CLOSED)).unwrap();
        assert_eq!(plan, Plan::Steps(vec![Step::StopDocker]));
        let plan = BootOrder.plan(&Config::default(), &facts("active", OPEN)).unwrap();
        assert_eq!(plan, Plan::Nothing);
    }

    #[test]
    fn docker_with_data_to_be_moved_is_left_to_who_moves_it() {
        let mut facts = facts("active", CLOSED);
        facts.data = Fact::new("t", Ok(Some("/var/lib/docker/volumes/v".into())));
        let verdict = BootOrder.judge(&Config::default(), &facts).unwrap();
        assert_eq!(verdict.word(), "pass");
        assert!(verdict.sentence().contains("/var/lib/docker/volumes/v"), "{verdict:?}");
        assert_eq!(BootOrder.plan(&Config::default(), &facts), Ok(Plan::Nothing));
        // Never moved, it must not run.
        let mut never = Config::default();
        never.docker.migrate = Migrate::Never;
        assert_eq!(BootOrder.judge(&never, &facts).unwrap().word(), "fail");
        assert_eq!(BootOrder.plan(&never, &facts), Ok(Plan::Steps(vec![Step::StopDocker])));
        facts.data = Fact::new("t", Err(anyhow!("EIO")));
        assert_eq!(word(&facts), "unknown");
    }

    #[test]
    fn containers_that_outlive_docker_are_not_left_to_write() {
        let with = |active: &str, gate: bool| {
            let containers = Fact::new("t", Ok(vec!["0123456789abcdef".to_owned()]));
            Facts { containers, ..facts(active, gate) }
        };
        let mut allowed = Config::default();
        allowed.docker.migrate = Migrate::Running;
        let judged = |config: &Config, facts: &Facts| match BootOrder.judge(config, facts).unwrap()
        {
            Verdict::Fail { observed, remedy, .. } => (observed, remedy),
            other => (other.word().to_owned(), String::new()),
        };
        let alone = with("inactive", CLOSED);
        let (observed, remedy) = judged(&Config::default(), &alone);
        assert!(observed.starts_with("containers run (0123456789ab), and the gate"), "{observed}");
        assert!(remedy.contains("docker.migrate to \"running\""), "{remedy}");
        let plan = BootOrder.plan(&Config::default(), &alone).unwrap();
        assert!(
            matches!(&plan, Plan::Refuse { why } if why.contains("(0123456789ab)")),
            "{plan:?}"
        );
        assert_eq!(judged(&allowed, &alone).1, "run `hostagent provision`, which stops them");
        assert_eq!(BootOrder.plan(&allowed, &alone), Ok(Plan::Steps(vec![Step::StopDocker])));
        // With Docker, which is stopped in any case.
        let both = with("active", CLOSED);
        assert!(judged(&Config::default(), &both).1.starts_with("stop the containers (01234567"));
        let stop = Ok(Plan::Steps(vec![Step::StopDocker]));
        assert_eq!(BootOrder.plan(&Config::default(), &both), stop);
        // On the volume they may run; and where their data is to be moved, somebody else decides.
        assert_eq!(word(&with("inactive", OPEN)), "pass");
        let mut moved = with("inactive", CLOSED);
        moved.data = Fact::new("t", Ok(Some("/var/lib/docker/volumes/v".into())));
        assert_eq!(word(&moved), "pass");
        assert_eq!(BootOrder.plan(&Config::default(), &moved), Ok(Plan::Nothing));
        moved.containers = Fact::new("t", Err(anyhow!("EIO")));
        assert_eq!(word(&moved), "unknown");
        // Without a Docker that could start, too.
        let mut gone = with("inactive", CLOSED);
        for i in 0..3 {
            change(&mut gone, i, |u| u.load_state = "not-found".into());
        }
        assert_eq!(word(&gone), "fail");
    }

    type Hole = fn(&mut Unit);

    #[test]
    fn every_hole_in_the_order_fails() {
        let holes: [(usize, Hole); 9] = [
            (1, |u| u.exec_start_pre.clear()),
            (1, |u| u.exec_start_pre[0].ignore_failure = true),
            (1, |u| u.exec_start_pre[0].argv = vec!["/bin/true".into()]),
            (2, |u| u.requires_mounts_for.retain(|p| p != "/var/lib/containerd")),
            (2, |u| u.need_daemon_reload = true),
            (2, |u| u.load_state = "bad-setting".into()),
            (3, |u| u.unit_file_state = "disabled".into()),
            (3, |u| u.load_state = "not-found".into()),
            (3, |u| u.after.push("cloud-final.service".into())),
        ];
        for (i, (unit, hole)) in holes.into_iter().enumerate() {
            let mut facts = facts("inactive", CLOSED);
            change(&mut facts, unit, hole);
            assert_eq!(word(&facts), "fail", "case {i}");
        }
    }

    #[test]
    fn a_host_without_docker_is_not_concerned() {
        let mut facts = facts("inactive", CLOSED);
        for i in 0..3 {
            change(&mut facts, i, |u| u.load_state = "not-found".into());
        }
        assert_eq!(word(&facts), "not-applicable");
        facts.units[1].unit = Fact::new("t", Err(anyhow!("no D-Bus")));
        assert_eq!(word(&facts), "unknown");
    }
}
