//! `core-dumps`: what a crashing program held in memory is not written to the root disk, nor what
//! all of them held when the kernel crashes.
//!
//! The kernel gives a dump to a program, or writes it to a path. A relative path is below the
//! crashing program's working directory: inside a container that is Docker's storage, but for Docker
//! itself and everything else on the host it is the root disk. As for `swap`, an encrypted root
//! volume does not count.

use std::path::{Component, Path};

use serde::Serialize;

use super::bar;
use crate::config::Config;
use crate::control::{About, Context, Control, Fact, Plan, Unknown, Verdict};
use crate::host::kernel::{self, CORE_PATTERN};
use crate::host::settings::{self, Setting};
use crate::host::systemd::Unit;
use crate::step::Step;

/// See the module.
pub struct CoreDumps;

/// What is observed.
#[derive(Debug, Serialize)]
pub struct Facts {
    /// Where the running kernel sends dumps.
    pub pattern: Fact<String>,
    /// What sets that at boot.
    pub at_boot: Fact<Option<Setting>>,
    /// systemd-coredump's `Storage=`.
    pub storage: Fact<Option<Setting>>,
    /// systemd-coredump's `ProcessSizeMax=`.
    pub process_size_max: Fact<Option<Setting>>,
    /// Whether a second kernel waits to save the memory when this one crashes.
    pub crash_kernel: Fact<bool>,
    /// The services that arrange for dumps by themselves.
    pub services: Vec<Service>,
}

/// A service and its unit.
#[derive(Debug, Serialize)]
pub struct Service {
    /// The unit's name.
    pub name: &'static str,
    /// The unit.
    pub unit: Fact<Unit>,
}

/// Ubuntu's crash reporter, which sets the pattern at every boot, and those that load a crash kernel
/// in Debian and elsewhere.
const SERVICES: [&str; 3] = ["apport.service", "kdump-tools.service", "kdump.service"];

/// What keeps nothing. systemd sets this pattern itself until the system's settings are read.
const NOTHING: &str = "|/bin/false";

/// Read after those of the packages and after `99-sysctl.conf`.
const SYSCTL_FILE: &str = "/etc/sysctl.d/zz-hostagent.conf";
const COREDUMP_FILE: &str = "/etc/systemd/coredump.conf.d/zz-hostagent.conf";

/// What becomes of a dump under a pattern.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Handler {
    /// It is thrown away.
    Nobody,
    /// It is written to the data volume.
    Volume,
    /// It goes to systemd-coredump, whose settings decide.
    Coredump,
    /// It is kept somewhere else, or by a program that is not known.
    Elsewhere,
}

impl Control for CoreDumps {
    type Facts = Facts;

    const ABOUT: About = About {
        id: "core-dumps",
        title: "Core dumps are not kept on the root disk",
        why: "A core dump is the memory of a program, and the memory of a container, of its shim and \
              of Docker holds patient data.",
        requires: &[],
        acts_after: &[],
    };

    async fn observe(&self, cx: &Context) -> Facts {
        let systemd = cx.host.systemd().await;
        let mut services = Vec::new();
        for name in SERVICES {
            let unit = match &systemd {
                Ok(systemd) => systemd.unit(name).await,
                Err(e) => Err(anyhow::anyhow!("{e:#}")),
            };
            services.push(Service { name, unit: Fact::new("systemd (D-Bus)", unit) });
        }
        let coredump = |key| settings::of_systemd("coredump.conf", "Coredump", key);
        Facts {
            pattern: Fact::new("/proc/sys/kernel/core_pattern", kernel::get(CORE_PATTERN)),
            at_boot: Fact::new("sysctl.d", settings::of_sysctl(CORE_PATTERN)),
            storage: Fact::new("coredump.conf", coredump("Storage")),
            process_size_max: Fact::new("coredump.conf", coredump("ProcessSizeMax")),
            crash_kernel: Fact::new(
                "/sys/kernel/kexec_crash_loaded",
                kernel::crash_kernel_is_loaded(),
            ),
            services,
        }
    }

    fn judge(&self, config: &Config, facts: &Facts) -> Result<Verdict, Unknown> {
        let pattern = facts.pattern.known()?;
        let handler = handler(config, pattern);
        let wrong = wrong(config, facts)?;
        if let Some(observed) = wrong {
            return Ok(Verdict::fail(
                format!(
                    "core dumps thrown away or written below {}, now and at the next boot",
                    config.volume.mount_point
                ),
                observed,
                "run `hostagent provision`",
            ));
        }
        Ok(Verdict::pass(match handler {
            Handler::Volume => format!("core dumps go to {pattern} on the data volume"),
            Handler::Coredump => "systemd-coredump notes crashes and keeps no dump".to_owned(),
            _ => format!("core dumps are thrown away ({pattern})"),
        }))
    }

    fn plan(&self, config: &Config, facts: &Facts) -> Result<Plan, Unknown> {
        let (mut steps, mut refused) = (Vec::new(), Vec::new());
        for Service { name, unit } in &facts.services {
            if unit.known()?.is_up() {
                steps.push(Step::StopUnit { unit: (*name).to_owned() });
            }
        }
        let written = steps.len();
        for Service { name, unit } in &facts.services {
            if comes(unit.known()?) {
                steps.push(bar(name, Self::ABOUT.id));
            }
        }
        if steps.len() > written {
            steps.push(Step::ReloadManager);
        }
        if *facts.crash_kernel.known()?
            && !facts.services.iter().any(|s| s.name != APPORT && s.up())
        {
            refused.push(
                "a crash kernel is loaded, and not by a service that is known: remove what loads it"
                    .to_owned(),
            );
        }

        // The running value, after apport is stopped: that sets one itself.
        let running = handler(config, facts.pattern.known()?);
        let at_boot = facts.at_boot.known()?;
        let mut lasting = at_boot.as_ref().map(|s| (handler(config, &s.value), s.value.as_str()));
        if lasting.is_none_or(|(handler, _)| handler == Handler::Elsewhere) {
            if let Some(setting) = at_boot
                && read_after(setting, SYSCTL_FILE)
            {
                let file = setting.file.display();
                refused.push(format!("{file} sets {CORE_PATTERN}, and is read last: change it"));
            } else {
                let content = format!(
                    "# Written by hostagent (control core-dumps). Changes are overwritten.\n\
                     # A core dump is memory, and must not be kept on the root disk.\n\
                     {CORE_PATTERN} = {NOTHING}\n"
                );
                steps.push(Step::WriteFile { path: SYSCTL_FILE.into(), content, mode: 0o644 });
            }
            lasting = Some((Handler::Nobody, NOTHING));
        }
        let apport_was_up = facts.services.iter().any(|s| s.name == APPORT && s.up());
        if let Some((_, value)) = lasting
            && (running == Handler::Elsewhere || apport_was_up)
        {
            let (name, value) = (CORE_PATTERN.to_owned(), value.to_owned());
            steps.push(Step::SetKernel { name, value });
        }

        let stays = running == Handler::Coredump
            || lasting.is_some_and(|(handler, _)| handler == Handler::Coredump);
        if stays && kept_by_coredump(facts)?.is_some() {
            let settings = [facts.storage.known()?, facts.process_size_max.known()?];
            let later = settings.into_iter().flatten().find(|s| read_after(s, COREDUMP_FILE));
            if let Some(setting) = later {
                let file = setting.file.display();
                refused.push(format!(
                    "{file} has systemd-coredump keep dumps, and is read last: change it"
                ));
            } else {
                steps.push(Step::WriteFile {
                    path: COREDUMP_FILE.into(),
                    content: COREDUMP_CONTENT.to_owned(),
                    mode: 0o644,
                });
            }
        }
        Ok(Plan::with_refusals(steps, &refused))
    }
}

const APPORT: &str = SERVICES[0];

const COREDUMP_CONTENT: &str = "\
# Written by hostagent (control core-dumps). Changes are overwritten.
[Coredump]
# A core dump is memory, and must not be kept on the root disk.
Storage=none
# Without this it would be written there for as long as it is looked at.
ProcessSizeMax=0
";

impl Service {
    fn up(&self) -> bool {
        self.unit.known().is_ok_and(Unit::is_up)
    }
}

/// Whether something starts the unit at the next boot.
fn comes(unit: &Unit) -> bool {
    unit.load_state == "loaded"
        && !unit.wanted_by.is_empty()
        && (!unit.barred || unit.need_daemon_reload)
}

/// Whether a setting's file is read after one of ours that would decide it otherwise.
fn read_after(setting: &Setting, ours: &str) -> bool {
    setting.file.file_name() > Path::new(ours).file_name()
}

/// The first thing that is wrong.
fn wrong(config: &Config, facts: &Facts) -> Result<Option<String>, Unknown> {
    let pattern = facts.pattern.known()?;
    let running = handler(config, pattern);
    if running == Handler::Elsewhere {
        return Ok(Some(format!("{CORE_PATTERN} is {pattern:?}")));
    }
    let Some(setting) = facts.at_boot.known()? else {
        return Ok(Some(format!("nothing sets {CORE_PATTERN} at the next boot")));
    };
    let lasting = handler(config, &setting.value);
    if lasting == Handler::Elsewhere {
        return Ok(Some(format!(
            "at the next boot, {} sets {CORE_PATTERN} to {:?}",
            setting.file.display(),
            setting.value
        )));
    }
    if [running, lasting].contains(&Handler::Coredump)
        && let Some(kept) = kept_by_coredump(facts)?
    {
        return Ok(Some(kept));
    }
    for Service { name, unit } in &facts.services {
        let unit = unit.known()?;
        if unit.is_up() {
            return Ok(Some(format!("{name} is {}", unit.active_state)));
        }
        if comes(unit) {
            return Ok(Some(format!("{name} is started at the next boot")));
        }
    }
    Ok(facts.crash_kernel.known()?.then(|| "a crash kernel is loaded (kdump)".to_owned()))
}

/// What systemd-coredump keeps of a dump, if it keeps any. Its defaults are `external` and gigabytes
/// (coredump.conf(5)). Even with `Storage=none` it writes the dump to disk, and removes it, unless
/// it is told to look at no byte of it.
fn kept_by_coredump(facts: &Facts) -> Result<Option<String>, Unknown> {
    let none = facts.storage.known()?.as_ref().is_some_and(|s| s.value == "none");
    let zero = facts.process_size_max.known()?.as_ref().is_some_and(|s| s.value == "0");
    Ok(match (none, zero) {
        (true, true) => None,
        (false, _) => Some("systemd-coredump keeps core dumps".to_owned()),
        (true, false) => Some("systemd-coredump writes core dumps to disk to look at them".into()),
    })
}

fn handler(config: &Config, pattern: &str) -> Handler {
    if let Some(command) = pattern.strip_prefix('|') {
        let program = command.split_whitespace().next().unwrap_or_default();
        return match program {
            "/bin/false" | "/usr/bin/false" | "/bin/true" | "/usr/bin/true" => Handler::Nobody,
            "/lib/systemd/systemd-coredump" | "/usr/lib/systemd/systemd-coredump" => {
                Handler::Coredump
            }
            _ => Handler::Elsewhere,
        };
    }
    // Below the mount point there is nothing but the volume: the directory underneath is immutable.
    let path = Path::new(pattern);
    let goes_back = path.components().any(|part| part == Component::ParentDir);
    if path.starts_with(config.volume.mount_point.path()) && !goes_back {
        return Handler::Volume;
    }
    Handler::Elsewhere
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Seen;
    use anyhow::anyhow;

    fn setting(value: &str, file: &str) -> Setting {
        Setting { value: value.into(), file: file.into(), changed: jiff::Timestamp::UNIX_EPOCH }
    }

    /// Debian as it is installed, with this pattern in force and this one for the next boot.
    fn facts(running: &str, at_boot: Option<(&str, &str)>) -> Facts {
        let unit = || Unit {
            load_state: "not-found".into(),
            active_state: "inactive".into(),
            ..Unit::default()
        };
        Facts {
            pattern: Fact::new("t", Ok(running.to_owned())),
            at_boot: Fact::new("t", Ok(at_boot.map(|(value, file)| setting(value, file)))),
            storage: Fact::new("t", Ok(None)),
            process_size_max: Fact::new("t", Ok(None)),
            crash_kernel: Fact::new("t", Ok(false)),
            services: SERVICES
                .map(|name| Service { name, unit: Fact::new("t", Ok(unit())) })
                .into(),
        }
    }

    fn shut() -> Facts {
        facts(NOTHING, Some((NOTHING, SYSCTL_FILE)))
    }

    const VENDOR: &str = "/usr/lib/sysctl.d/10-coredump-debian.conf";
    const COREDUMP: &str =
        "|/usr/lib/systemd/systemd-coredump %P %u %g %s %t 9223372036854775808 %h";
    const COREDUMP_SYSCTL: &str = "/usr/lib/sysctl.d/50-coredump.conf";

    fn judge(facts: &Facts) -> String {
        match CoreDumps.judge(&Config::default(), facts) {
            Ok(verdict) => format!("{}: {}", verdict.word(), verdict.sentence()),
            Err(Unknown(why)) => format!("unknown: {why}"),
        }
    }

    fn texts(facts: &Facts) -> (Vec<String>, String) {
        let (steps, why) = match CoreDumps.plan(&Config::default(), facts).unwrap() {
            Plan::Nothing => (vec![], String::new()),
            Plan::Steps(steps) => (steps, String::new()),
            Plan::Refuse { why } => (vec![], why),
            Plan::Contain { steps, why } => (steps, why),
        };
        (steps.iter().map(ToString::to_string).collect(), why)
    }

    fn service(facts: &mut Facts, name: &str, active: &str, wanted_by: &[&str]) {
        let unit = Unit {
            load_state: "loaded".into(),
            active_state: active.into(),
            wanted_by: wanted_by.iter().map(|&name| name.to_owned()).collect(),
            ..Unit::default()
        };
        let at = SERVICES.iter().position(|service| *service == name).unwrap();
        facts.services[at].unit = Fact::new("t", Ok(unit));
    }

    #[test]
    fn a_pattern_is_judged_by_where_the_dump_goes() {
        let config = Config::default();
        for (pattern, expected) in [
            ("|/bin/false", Handler::Nobody),
            ("|/usr/bin/false %p", Handler::Nobody),
            ("| /bin/true", Handler::Nobody),
            (COREDUMP, Handler::Coredump),
            ("|/lib/systemd/systemd-coredump %P", Handler::Coredump),
            ("/data/cores/core.%p", Handler::Volume),
            ("|/usr/share/apport/apport -p%p -s%s", Handler::Elsewhere),
            ("|/data/handler", Handler::Elsewhere),
            ("core", Handler::Elsewhere),
            ("", Handler::Elsewhere),
            ("/var/crash/core.%p", Handler::Elsewhere),
            ("/database/core", Handler::Elsewhere),
            ("/data/../var/core", Handler::Elsewhere),
            ("@/run/coredump.socket", Handler::Elsewhere),
            ("|", Handler::Elsewhere),
        ] {
            assert_eq!(handler(&config, pattern), expected, "{pattern}");
        }
    }

    #[test]
    fn debian_as_installed_is_put_right() {
        let bare = facts("core", Some(("core", VENDOR)));
        assert_eq!(judge(&bare), "fail: kernel.core_pattern is \"core\"");
        let (steps, why) = texts(&bare);
        assert_eq!(
            steps,
            ["write /etc/sysctl.d/zz-hostagent.conf", "set kernel.core_pattern to |/bin/false"]
        );
        assert_eq!(why, "");
        assert!(judge(&shut()).starts_with("pass"), "{}", judge(&shut()));
        assert_eq!(texts(&shut()), (vec![], String::new()));
    }

    #[test]
    fn both_now_and_the_next_boot_count() {
        assert!(judge(&facts("core", Some((NOTHING, SYSCTL_FILE)))).starts_with("fail"));
        assert!(judge(&facts(NOTHING, Some(("core", VENDOR)))).starts_with("fail"));
        assert!(judge(&facts(NOTHING, None)).starts_with("fail"));
        assert_eq!(texts(&facts(NOTHING, None)).0, ["write /etc/sysctl.d/zz-hostagent.conf"]);
        // The operator's own choice of a place on the volume is kept, and put in force.
        let volume = facts("core", Some(("/data/cores/%p", "/etc/sysctl.d/60-cores.conf")));
        assert_eq!(texts(&volume).0, ["set kernel.core_pattern to /data/cores/%p"]);
        // What would be read after our file is the operator's to change.
        let later = facts(NOTHING, Some(("core", "/etc/sysctl.d/zzz.conf")));
        let (steps, why) = texts(&later);
        assert!(steps.is_empty() && why.contains("/etc/sysctl.d/zzz.conf"), "{steps:?} {why}");
    }

    #[test]
    fn systemd_coredump_may_note_and_must_not_keep() {
        let mut facts = facts(COREDUMP, Some((COREDUMP, COREDUMP_SYSCTL)));
        assert_eq!(judge(&facts), "fail: systemd-coredump keeps core dumps");
        assert_eq!(texts(&facts).0, [format!("write {COREDUMP_FILE}")]);
        facts.storage = Fact::new("t", Ok(Some(setting("none", "/etc/systemd/coredump.conf"))));
        assert!(judge(&facts).starts_with("fail: systemd-coredump writes"), "{}", judge(&facts));
        assert_eq!(texts(&facts).0, [format!("write {COREDUMP_FILE}")]);
        facts.process_size_max = Fact::new("t", Ok(Some(setting("0", COREDUMP_FILE))));
        assert!(judge(&facts).starts_with("pass"), "{}", judge(&facts));
        assert!(texts(&facts).0.is_empty());
        let late = "/run/systemd/coredump.conf.d/zzz.conf";
        facts.storage = Fact::new("t", Ok(Some(setting("external", late))));
        assert!(texts(&facts).1.contains(late), "{:?}", texts(&facts));
    }

    #[test]
    fn what_arranges_for_dumps_is_stopped_and_barred() {
        let mut apport = facts("|/usr/share/apport/apport -p%p", Some(("core", VENDOR)));
        service(&mut apport, APPORT, "active", &["multi-user.target"]);
        assert_eq!(
            texts(&apport).0,
            [
                "stop apport.service",
                "write /etc/systemd/system/apport.service.d/10-hostagent.conf",
                "make systemd read its units again",
                "write /etc/sysctl.d/zz-hostagent.conf",
                "set kernel.core_pattern to |/bin/false",
            ]
        );
        // With everything else in order it is wrong all the same: it sets the pattern at the next boot.
        let mut waits = shut();
        service(&mut waits, APPORT, "inactive", &["multi-user.target"]);
        assert_eq!(judge(&waits), "fail: apport.service is started at the next boot");
        let Seen::Value(unit) = &mut waits.services[0].unit.seen else { panic!() };
        unit.barred = true;
        assert!(judge(&waits).starts_with("pass"), "{}", judge(&waits));

        let mut kdump = shut();
        kdump.crash_kernel = Fact::new("t", Ok(true));
        assert_eq!(judge(&kdump), "fail: a crash kernel is loaded (kdump)");
        assert!(texts(&kdump).1.contains("crash kernel"));
        service(&mut kdump, "kdump-tools.service", "active", &["multi-user.target"]);
        let (steps, why) = texts(&kdump);
        assert!(steps[0] == "stop kdump-tools.service" && why.is_empty(), "{steps:?} {why}");
    }

    #[test]
    fn an_unknown_fact_never_passes() {
        let all: [fn(&mut Facts); 4] = [
            |f| f.pattern = Fact::new("t", Err(anyhow!("x"))),
            |f| f.at_boot = Fact::new("t", Err(anyhow!("x"))),
            |f| f.crash_kernel = Fact::new("t", Err(anyhow!("x"))),
            |f| f.services[1].unit = Fact::new("t", Err(anyhow!("x"))),
        ];
        for (i, hide) in all.into_iter().enumerate() {
            let mut facts = shut();
            hide(&mut facts);
            assert!(judge(&facts).starts_with("unknown"), "case {i}: {}", judge(&facts));
            assert!(CoreDumps.plan(&Config::default(), &facts).is_err(), "case {i}");
        }
        // systemd-coredump's settings count only where it is used.
        let mut facts = facts(COREDUMP, Some((COREDUMP, COREDUMP_SYSCTL)));
        facts.storage = Fact::new("t", Err(anyhow!("x")));
        assert!(judge(&facts).starts_with("unknown"));
    }
}
