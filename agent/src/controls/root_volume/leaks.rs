//! What of a container's words could come to rest on a plain volume of the system: journald, a syslog daemon
//! that it feeds, `/tmp`, and Docker's log driver; and what would keep them from it.

use std::path::Path;

use serde::Serialize;

use super::super::unit_path;
use super::{Facts, is_fit, names};
use crate::control::{Context, Fact, Plan, Unknown};
use crate::host::docker::{self, HeldFile};
use crate::host::ground::Ground;
use crate::host::logs::{self, LogDriver};
use crate::host::mounts::{self, Mount};
use crate::host::settings::{self, Setting};
use crate::host::systemd::{Systemd, Unit};
use crate::step::Step;

/// The ways from a container to a plain disk.
#[derive(Debug, Serialize)]
pub struct Leaks {
    /// journald's `Storage=`.
    pub storage: Fact<Option<Setting>>,
    /// journald's `ForwardToSyslog=`.
    pub forward: Fact<Option<Setting>>,
    /// `systemd-journald.service`
    pub journald: Fact<Unit>,
    /// The files that journald holds open for writing.
    pub held: Fact<Vec<HeldFile>>,
    /// Whatever goes by the name of `syslog.service`, as rsyslog and syslog-ng do.
    pub syslog: Fact<Unit>,
    /// The file that has rsyslog read the journal by itself.
    pub journal_reader: Fact<Option<String>>,
    /// What is mounted on `/tmp`.
    pub tmp_mounts: Fact<Vec<Mount>>,
    /// `tmp.mount`
    pub tmp_unit: Fact<Unit>,
    /// Docker's default log driver.
    pub driver: Fact<LogDriver>,
}

const JOURNALD: &str = "systemd-journald.service";
pub(super) const JOURNALD_FILE: &str = "/etc/systemd/journald.conf.d/zz-hostagent.conf";
const TMP: &str = "tmp.mount";
pub(super) const LOCAL_FS: &str = "local-fs.target";

impl Leaks {
    /// Looks at all of them.
    pub(super) async fn observe(cx: &Context) -> Self {
        let systemd = cx.host.systemd().await;
        let journald = loaded(systemd.as_ref(), JOURNALD).await;
        let held = match journald.known() {
            Ok(unit) if unit.main_pid != 0 => docker::held_files(unit.main_pid),
            Ok(_) => Err(anyhow::anyhow!("journald does not run")),
            Err(Unknown(why)) => Err(anyhow::anyhow!(why)),
        };
        let driver = match loaded(systemd.as_ref(), "docker.service").await.known() {
            Ok(unit) => logs::docker_driver(Some(unit.main_pid).filter(|pid| *pid != 0)),
            Err(Unknown(why)) => Err(anyhow::anyhow!(why)),
        };
        let setting = |key| settings::of_systemd("journald.conf", "Journal", key);
        let reader = logs::journal_reader().map(|path| path.map(|p| p.display().to_string()));
        Self {
            storage: Fact::new("journald.conf", setting("Storage")),
            forward: Fact::new("journald.conf", setting("ForwardToSyslog")),
            journald,
            held: Fact::new("/proc/PID/fd", held),
            syslog: loaded(systemd.as_ref(), "syslog.service").await,
            journal_reader: Fact::new("/etc/rsyslog.conf", reader),
            tmp_mounts: Fact::new("/proc/self/mountinfo", mounts::at(Path::new("/tmp"))),
            tmp_unit: loaded(systemd.as_ref(), TMP).await,
            driver: Fact::new("/etc/docker/daemon.json", driver),
        }
    }

    /// The first way from a container to a plain disk.
    pub(super) fn wrong(&self, facts: &Facts) -> Result<Option<String>, Unknown> {
        if !is_fit(&facts.journal, &facts.attached)? {
            if let Some(file) = self.held_journal()? {
                return Ok(Some(format!("journald writes {}", file.path)));
            }
            if !self.is_volatile()? {
                return Ok(Some("journald keeps a persistent journal".into()));
            }
            if let Some(setting) = self.not_in_force()? {
                let file = setting.file.display();
                return Ok(Some(format!("journald runs for longer than {file} is there")));
            }
        }
        if self.syslog_writes(facts)? {
            if let Some(file) = self.journal_reader.known()? {
                return Ok(Some(format!("rsyslog reads the journal ({file})")));
            }
            if self.forwards()? {
                return Ok(Some("journald forwards to syslog".into()));
            }
            if let Some(setting) = self.not_in_force()? {
                let file = setting.file.display();
                return Ok(Some(format!("journald runs for longer than {file} is there")));
            }
        }
        if !is_fit(&facts.tmp, &facts.attached)? {
            return Ok(Some("/tmp is there".into()));
        }
        if self.tmp_would_be_plain(facts)? {
            return Ok(Some("/tmp would be there at the next boot".into()));
        }
        self.wrong_driver()
    }

    /// What would close them.
    pub(super) fn plan(&self, facts: &Facts) -> Result<Plan, Unknown> {
        let (mut steps, mut refused) = (Vec::new(), Vec::new());
        let persistent = !is_fit(&facts.journal, &facts.attached)?;
        let syslog = self.syslog_writes(facts)?;
        let written = (persistent && !self.is_volatile()?) || (syslog && self.forwards()?);
        if written {
            let later = [self.storage.known()?, self.forward.known()?]
                .into_iter()
                .flatten()
                .find(|setting| setting.file.file_name() > Path::new(JOURNALD_FILE).file_name());
            if let Some(setting) = later {
                let file = setting.file.display();
                refused.push(format!("{file} has the journal kept, and is read last: change it"));
            } else {
                let content = JOURNALD_CONTENT.to_owned();
                steps.push(Step::WriteFile { path: JOURNALD_FILE.into(), content, mode: 0o644 });
            }
        }
        let stale = (persistent || syslog) && self.not_in_force()?.is_some();
        if (written && refused.is_empty())
            || stale
            || (persistent && self.held_journal()?.is_some())
        {
            // What its clients hold open stays open: PID 1 keeps the descriptors meanwhile.
            steps.push(Step::RestartUnit { unit: JOURNALD.to_owned() });
        }
        if let (true, Some(file)) = (syslog, self.journal_reader.known()?) {
            refused.push(format!("{file} has rsyslog read the journal: remove imjournal there"));
        }
        self.plan_tmp(facts, &mut steps, &mut refused)?;
        if let Some(wrong) = self.wrong_driver()? {
            refused.push(format!("{wrong}: name another driver or address there"));
        }
        Ok(Plan::with_refusals(steps, &refused))
    }

    fn plan_tmp(
        &self,
        facts: &Facts,
        steps: &mut Vec<Step>,
        refused: &mut Vec<String>,
    ) -> Result<(), Unknown> {
        let tmp = facts.tmp.known()?;
        let fit = is_fit(&facts.tmp, &facts.attached)?;
        if fit && !self.tmp_would_be_plain(facts)? {
            return Ok(());
        }
        let unit = self.tmp_unit.known()?;
        if unit.load_state == "masked" {
            refused.push(format!("{TMP} is masked: run `systemctl unmask {TMP}`"));
            return Ok(());
        }
        if !fit && !self.tmp_mounts.known()?.is_empty() {
            let from = names(tmp);
            refused.push(format!("/tmp is mounted from {from}: see what mounts it (/etc/fstab?)"));
            return Ok(());
        }
        if unit.fragment_path.is_empty() {
            let content = TMP_CONTENT.to_owned();
            steps.push(Step::WriteFile { path: unit_path(TMP), content, mode: 0o644 });
        }
        if !unit.wanted_by.iter().any(|name| name == LOCAL_FS) {
            let path = unit_path(&format!("{LOCAL_FS}.d")).join("10-hostagent.conf");
            let content = LOCAL_FS_CONTENT.to_owned();
            steps.push(Step::WriteFile { path, content, mode: 0o644 });
        }
        steps.push(Step::ReloadManager);
        if !fit {
            steps.push(Step::StartUnit { unit: TMP.to_owned() });
        }
        Ok(())
    }

    /// The file below the persistent journal that journald writes to, if it does.
    fn held_journal(&self) -> Result<Option<&HeldFile>, Unknown> {
        let below = |file: &&HeldFile| Path::new(&file.path).starts_with(logs::PERSISTENT_JOURNAL);
        Ok(self.held.known()?.iter().find(below))
    }

    fn is_volatile(&self) -> Result<bool, Unknown> {
        let storage = self.storage.known()?.as_ref();
        // Not `auto`: that is persistent as soon as somebody makes the directory.
        Ok(storage.is_some_and(|s| matches!(s.value.as_str(), "volatile" | "none")))
    }

    /// Whether there is a syslog daemon that writes to a plain disk.
    fn syslog_writes(&self, facts: &Facts) -> Result<bool, Unknown> {
        let there = self.syslog.known()?;
        let runs = there.is_up() || !matches!(there.load_state.as_str(), "not-found" | "masked");
        Ok(runs && !is_fit(&facts.logs, &facts.attached)?)
    }

    fn forwards(&self) -> Result<bool, Unknown> {
        // Unset it means one thing to systemd and another to Debian.
        let no = ["no", "n", "false", "f", "off", "0"];
        let forward = self.forward.known()?.as_ref();
        Ok(!forward.is_some_and(|s| no.contains(&s.value.to_ascii_lowercase().as_str())))
    }

    /// A setting that came after journald was started: it has read the old one.
    fn not_in_force(&self) -> Result<Option<&Setting>, Unknown> {
        let Some(started) = self.journald.known()?.main_started else {
            return Err(Unknown("systemd does not say when journald was started".into()));
        };
        let settings = [self.storage.known()?, self.forward.known()?];
        Ok(settings.into_iter().flatten().find(|setting| setting.changed > started))
    }

    /// Whether `/tmp` is in memory, and would be on the plain root volume at the next boot. On a disk
    /// that EC2 encrypts it is the operator's, who sees to its coming back.
    fn tmp_would_be_plain(&self, facts: &Facts) -> Result<bool, Unknown> {
        let in_memory = facts.tmp.known()?.iter().all(Ground::hides);
        Ok(in_memory && !is_fit(&facts.root, &facts.attached)? && !self.tmp_comes_back()?)
    }

    /// Whether systemd mounts memory on `/tmp` at the next boot.
    fn tmp_comes_back(&self) -> Result<bool, Unknown> {
        let unit = self.tmp_unit.known()?;
        Ok(!unit.fragment_path.is_empty() && unit.wanted_by.iter().any(|name| name == LOCAL_FS))
    }

    /// What is wrong with Docker's default log driver, if anything is. Below Docker's own storage
    /// and in the journal, what containers say is taken care of; what leaves the host is not on it.
    fn wrong_driver(&self) -> Result<Option<String>, Unknown> {
        let LogDriver { name, syslog_address, by } = self.driver.known()?;
        Ok(match name.as_str() {
            "none" | "json-file" | "local" | "journald" => None,
            "awslogs" | "fluentd" | "gcplogs" | "gelf" | "splunk" | "logentries" => None,
            "syslog" => syslog_address
                .as_deref()
                .filter(|address| is_local(address))
                .map(|address| format!("{by} has containers log to {address} on this host")),
            name => {
                Some(format!("{by} names the log driver {name}, and where it writes is not known"))
            }
        })
    }
}

/// Whether a syslog address is on this host, other than journald's own socket.
fn is_local(address: &str) -> bool {
    let Some((kind, rest)) = address.split_once("://") else { return true };
    if kind.starts_with("unix") {
        return rest != "/dev/log";
    }
    let host = rest.strip_prefix('[').map_or_else(
        || rest.split(':').next().unwrap_or_default(),
        |rest| rest.split(']').next().unwrap_or_default(),
    );
    matches!(host, "" | "localhost" | "::1" | "0.0.0.0" | "::") || host.starts_with("127.")
}

async fn loaded(systemd: Result<&&Systemd, &anyhow::Error>, name: &str) -> Fact<Unit> {
    let result = match systemd {
        Ok(systemd) => systemd.unit(name).await,
        Err(e) => Err(anyhow::anyhow!("{e:#}")),
    };
    Fact::new("systemd (D-Bus)", result)
}

const JOURNALD_CONTENT: &str = "\
# Written by hostagent (control root-volume). Changes are overwritten.
[Journal]
# The volume is not encrypted: what containers say must not be kept there, by nobody.
Storage=volatile
ForwardToSyslog=no
";

const TMP_CONTENT: &str = "\
# Written by hostagent (control root-volume). Changes are overwritten.
[Unit]
Description=Temporary files in memory
Documentation=file:/usr/share/doc/hostagent/README.md
ConditionPathIsSymbolicLink=!/tmp
DefaultDependencies=no
Conflicts=umount.target
Before=local-fs.target umount.target
# Unmounted before swap is stopped, which may hold its pages.
After=swap.target

[Mount]
What=tmpfs
Where=/tmp
Type=tmpfs
Options=mode=1777,strictatime,nosuid,nodev,size=50%,nr_inodes=1m
";

const LOCAL_FS_CONTENT: &str = "\
# Written by hostagent (control root-volume). Changes are overwritten.
[Unit]
# The volume is not encrypted: /tmp is in memory.
Wants=tmp.mount
";
