//! PID 1 over D-Bus (org.freedesktop.systemd1(5)): what it has loaded, and jobs whose result is
//! awaited. Never the unit files: what is on disk is not what is in force.

use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use futures_util::StreamExt as _;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use zbus::{OwnedObjectPath, OwnedVariant};

/// How long a property or a short call may take.
const CALL_DEADLINE: Duration = Duration::from_secs(15);

/// How long reloading all units may take: it runs every generator, which takes seconds on a busy
/// instance.
const RELOAD_DEADLINE: Duration = Duration::from_secs(60);

#[zbus::proxy(
    interface = "org.freedesktop.systemd1.Manager",
    default_service = "org.freedesktop.systemd1",
    default_path = "/org/freedesktop/systemd1"
)]
trait Manager {
    fn subscribe(&self) -> zbus::Result<()>;
    fn reload(&self) -> zbus::Result<()>;
    fn load_unit(&self, name: &str) -> zbus::Result<OwnedObjectPath>;
    fn start_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    fn stop_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    fn reload_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    fn restart_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    fn list_units_by_patterns(
        &self,
        states: &[&str],
        patterns: &[&str],
    ) -> zbus::Result<Vec<ListedUnit>>;
    fn list_unit_files_by_patterns(
        &self,
        states: &[&str],
        patterns: &[&str],
    ) -> zbus::Result<Vec<(String, String)>>;
    fn reset_failed_unit(&self, name: &str) -> zbus::Result<()>;

    #[zbus(property(emits_changed_signal = "false"))]
    fn environment(&self) -> zbus::Result<Vec<String>>;

    #[zbus(signal)]
    fn job_removed(&self, id: u32, job: OwnedObjectPath, unit: String, result: String);
}

/// What PID 1 has loaded of one unit.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Unit {
    /// `loaded`, `not-found`, `masked`, …
    pub load_state: String,
    /// `active`, `inactive`, `failed`, `activating`, …
    pub active_state: String,
    /// `enabled`, `disabled`, `static`, …; empty for a unit that is not installed.
    pub unit_file_state: String,
    /// Whether the files changed since they were loaded.
    pub need_daemon_reload: bool,
    /// The file the unit was loaded from.
    pub fragment_path: String,
    /// `After=`, implied ones included.
    pub after: Vec<String>,
    /// `Requires=`, implied ones included.
    pub requires: Vec<String>,
    /// `RequiresMountsFor=`
    pub requires_mounts_for: Vec<String>,
    /// Whether the condition [`BARRED`] keeps the unit from starting.
    pub barred: bool,
    /// The units that pull this one in: `WantedBy=` and `RequiredBy=` as they are in force.
    pub wanted_by: Vec<String>,
    /// The command lines of `ExecStartPre=`; a service's only.
    pub exec_start_pre: Vec<ExecCommand>,
    /// The main process; a service's only, 0 if none runs.
    pub main_pid: u32,
    /// The addresses of `Listen…=`, as systemd writes them; a socket's only.
    pub listen: Vec<String>,
    /// `BindIPv6Only=`: `default`, `both` or `ipv6-only`; a socket's only.
    pub bind_ipv6_only: String,
    /// `Accept=`: whether each connection gets a service of its own; a socket's only.
    pub accept: bool,
    /// When the main process was started; a service's only, none if it never was.
    pub main_started: Option<Timestamp>,
}

/// A condition that is never met: a unit that has it is not started, and what requires the unit is
/// started all the same.
pub const BARRED: &str = "ConditionPathExists=!/";

/// One command line of a unit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecCommand {
    /// The words of the command line.
    pub argv: Vec<String>,
    /// Whether its failure is ignored (a `-` before it).
    pub ignore_failure: bool,
}

/// How a service is started.
#[derive(Debug)]
pub struct StartCommand {
    /// The words of the command line; none for a unit that does not exist.
    pub argv: Vec<String>,
    /// The environment of PID 1 for its services and the unit's `Environment=`, which outdoes it, each
    /// as `NAME=value`.
    pub environment: Vec<String>,
    /// `EnvironmentFile=`, each with whether its absence is ignored.
    pub environment_files: Vec<(String, bool)>,
    /// `UnsetEnvironment=`: names, or assignments.
    pub unset_environment: Vec<String>,
}

impl Unit {
    /// Whether there is such a unit.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.load_state != "not-found"
    }

    /// Whether it runs, or is on its way there or back.
    #[must_use]
    pub fn is_up(&self) -> bool {
        !matches!(self.active_state.as_str(), "inactive" | "failed")
    }
}

/// A connection to PID 1.
#[derive(Debug)]
pub struct Systemd {
    connection: zbus::Connection,
    manager: ManagerProxy<'static>,
}

impl Systemd {
    /// Connects over the system bus.
    pub async fn connect() -> Result<Self> {
        let connect = async {
            let connection = zbus::Connection::system().await?;
            let manager = ManagerProxy::new(&connection).await?;
            // Without a subscription PID 1 does not send JobRemoved.
            manager.subscribe().await?;
            zbus::Result::Ok(Self { connection, manager })
        };
        within(connect).await.context("connecting to systemd over D-Bus")
    }

    /// What PID 1 has loaded of a unit; a unit that does not exist has the load state `not-found`.
    pub async fn unit(&self, name: &str) -> Result<Unit> {
        let read = async {
            let properties = self.properties(name).await?;
            let interface = |name: &'static str| zbus::names::InterfaceName::from_static_str(name);
            let all = properties.get_all(interface("org.freedesktop.systemd1.Unit")?).await?;
            let own = if name.ends_with(".service") {
                properties.get_all(interface("org.freedesktop.systemd1.Service")?).await?
            } else if name.ends_with(".socket") {
                properties.get_all(interface("org.freedesktop.systemd1.Socket")?).await?
            } else {
                std::collections::HashMap::default()
            };
            zbus::Result::Ok((all, own))
        };
        let (mut unit, mut own) =
            within(read).await.with_context(|| format!("asking systemd about {name}"))?;
        let doing = || format!("reading what systemd says of {name}");
        let mut is = Unit {
            load_state: take(&mut unit, "LoadState").with_context(doing)?,
            active_state: take(&mut unit, "ActiveState").with_context(doing)?,
            unit_file_state: take(&mut unit, "UnitFileState").with_context(doing)?,
            need_daemon_reload: take(&mut unit, "NeedDaemonReload").with_context(doing)?,
            fragment_path: take(&mut unit, "FragmentPath").with_context(doing)?,
            after: take(&mut unit, "After").with_context(doing)?,
            requires: take(&mut unit, "Requires").with_context(doing)?,
            requires_mounts_for: take(&mut unit, "RequiresMountsFor").with_context(doing)?,
            wanted_by: take(&mut unit, "WantedBy").with_context(doing)?,
            ..Unit::default()
        };
        is.wanted_by.extend(take::<Vec<String>>(&mut unit, "RequiredBy").with_context(doing)?);
        let conditions: Vec<ConditionTuple> = take(&mut unit, "Conditions").with_context(doing)?;
        is.barred = conditions.iter().any(|(kind, trigger, negate, parameter, _)| {
            *negate && !trigger && format!("{kind}=!{parameter}") == BARRED
        });
        if name.ends_with(".service") && is.exists() {
            is.main_pid = take(&mut own, "MainPID").with_context(doing)?;
            let started: u64 = take(&mut own, "ExecMainStartTimestamp").with_context(doing)?;
            is.main_started = i64::try_from(started)
                .ok()
                .filter(|started| *started != 0)
                .and_then(|started| Timestamp::from_microsecond(started).ok());
            let commands: Vec<ExecTuple> = take(&mut own, "ExecStartPre").with_context(doing)?;
            is.exec_start_pre = commands
                .into_iter()
                .map(|c| ExecCommand { argv: c.1, ignore_failure: c.2 })
                .collect();
        }
        if name.ends_with(".socket") && is.exists() {
            let listen: Vec<(String, String)> = take(&mut own, "Listen").with_context(doing)?;
            is.listen = listen.into_iter().map(|(_, address)| address).collect();
            is.bind_ipv6_only = take(&mut own, "BindIPv6Only").with_context(doing)?;
            is.accept = take(&mut own, "Accept").with_context(doing)?;
        }
        Ok(is)
    }

    /// Where the properties of a unit are.
    async fn properties(&self, name: &str) -> zbus::Result<zbus::fdo::PropertiesProxy<'static>> {
        zbus::fdo::PropertiesProxy::builder(&self.connection)
            .destination("org.freedesktop.systemd1")
            .path(self.manager.load_unit(name).await?)
            .build()
            .await
    }

    /// How a service is started: the words of its first `ExecStart=`, with variables as they stand
    /// there, and where these come from. Not a part of [`Unit`], which is shown: a variable may be a
    /// secret.
    pub async fn start_command(&self, name: &str) -> Result<StartCommand> {
        let read = async {
            let properties = self.properties(name).await?;
            let service = "org.freedesktop.systemd1.Service";
            Ok(properties.get_all(zbus::names::InterfaceName::from_static_str(service)?).await?)
        };
        let doing = || format!("asking systemd how {name} is started");
        let mut own = within(read).await.with_context(doing)?;
        let commands: Vec<ExecTuple> = take(&mut own, "ExecStart").with_context(doing)?;
        // Its first word is what the program is told that it is called (`@` in systemd.service(5)).
        let argv = commands.into_iter().next().map(|(program, mut argv, ..)| {
            argv.splice(..argv.len().min(1), [program]);
            argv
        });
        let mut environment = within(self.manager.environment()).await.with_context(doing)?;
        environment.extend(take::<Vec<String>>(&mut own, "Environment").with_context(doing)?);
        Ok(StartCommand {
            argv: argv.unwrap_or_default(),
            environment,
            environment_files: take(&mut own, "EnvironmentFiles").with_context(doing)?,
            unset_environment: take(&mut own, "UnsetEnvironment").with_context(doing)?,
        })
    }

    /// The names of the units that PID 1 has in memory and that match a shell pattern.
    pub async fn units_like(&self, pattern: &str) -> Result<Vec<String>> {
        let listed = within(self.manager.list_units_by_patterns(&[], &[pattern])).await;
        let listed = listed.with_context(|| format!("asking systemd for the units {pattern}"))?;
        Ok(listed.into_iter().map(|unit| unit.0).collect())
    }

    /// The names of the units that match a shell pattern and whose files, as they are on disk now,
    /// have them started at boot.
    pub async fn enabled_like(&self, pattern: &str) -> Result<Vec<String>> {
        let (states, patterns) = (["enabled"], [pattern]);
        let listed = within(self.manager.list_unit_files_by_patterns(&states, &patterns)).await;
        let listed =
            listed.with_context(|| format!("asking systemd for the unit files {pattern}"))?;
        let name = |path: String| path.rsplit('/').next().unwrap_or_default().to_owned();
        Ok(listed.into_iter().map(|(path, _)| name(path)).collect())
    }

    /// Makes PID 1 read all unit files again.
    pub async fn reload_manager(&self) -> Result<()> {
        within_time(RELOAD_DEADLINE, self.manager.reload())
            .await
            .context("reloading systemd's units")
    }

    /// Starts a unit and waits for the job's end. A failure or a start limit from before is
    /// forgotten first: what was refused then may be right now.
    pub async fn start(&self, name: &str, deadline: Duration) -> Result<()> {
        self.forget_failure(name).await;
        self.job("starting", name, self.manager.start_unit(name, "replace"), deadline).await
    }

    /// Makes systemd forget that a unit failed, and how often it was started lately.
    pub async fn forget_failure(&self, name: &str) {
        // Fails for a unit that is not loaded, which has nothing to forget.
        drop(within(self.manager.reset_failed_unit(name)).await);
    }

    /// Stops a unit and waits for the job's end.
    pub async fn stop(&self, name: &str, deadline: Duration) -> Result<()> {
        self.job("stopping", name, self.manager.stop_unit(name, "replace"), deadline).await
    }

    /// Makes a service read its configuration again and waits for the job's end.
    pub async fn reload(&self, name: &str, deadline: Duration) -> Result<()> {
        self.job("reloading", name, self.manager.reload_unit(name, "replace"), deadline).await
    }

    /// Stops and starts a unit and waits for the job's end.
    pub async fn restart(&self, name: &str, deadline: Duration) -> Result<()> {
        self.job("restarting", name, self.manager.restart_unit(name, "replace"), deadline).await
    }

    async fn job(
        &self,
        doing: &str,
        name: &str,
        call: impl Future<Output = zbus::Result<OwnedObjectPath>>,
        deadline: Duration,
    ) -> Result<()> {
        let work = async {
            // Before the call: a job may be over before its path arrives.
            let mut removed = self.manager.receive_job_removed().await?;
            let job = call.await?;
            while let Some(signal) = removed.next().await {
                let args = signal.args()?;
                if args.job == job {
                    return Ok(args.result.clone());
                }
            }
            Err(anyhow!("the connection to systemd ended"))
        };
        match tokio::time::timeout(deadline, work).await {
            Ok(Ok(result)) if result == "done" => Ok(()),
            Ok(Ok(result)) => {
                bail!(
                    "{doing} {name}: systemd's job ended with \"{result}\"; see `journalctl -b -u {name}`"
                )
            }
            Ok(Err(e)) => Err(e).with_context(|| format!("{doing} {name}")),
            Err(_) => bail!("{doing} {name}: not done after {} s", deadline.as_secs()),
        }
    }
}

/// `a(sasbttttuii)`: path, words, ignore failure, times of start and end twice, PID, code, status.
type ExecTuple = (String, Vec<String>, bool, u64, u64, u64, u64, u32, i32, i32);

/// `(sbbsi)`: kind, whether one of several suffices, whether it is negated, parameter, last result.
type ConditionTuple = (String, bool, bool, String, i32);

/// `(ssssssouso)`: name, description, load, active and sub state, followed unit, path, job's id, type
/// and path.
type ListedUnit =
    (String, String, String, String, String, String, OwnedObjectPath, u32, String, OwnedObjectPath);

fn take<T>(
    properties: &mut std::collections::HashMap<String, OwnedVariant>,
    name: &str,
) -> Result<T>
where
    T: TryFrom<OwnedVariant>,
    T::Error: Into<zbus::Error>,
{
    let value = properties.remove(name).with_context(|| format!("there is no property {name}"))?;
    T::try_from(value).map_err(|e| anyhow!("the property {name}: {}", e.into()))
}

async fn within<T>(call: impl Future<Output = zbus::Result<T>>) -> Result<T> {
    within_time(CALL_DEADLINE, call).await
}

async fn within_time<T>(
    deadline: Duration,
    call: impl Future<Output = zbus::Result<T>>,
) -> Result<T> {
    match tokio::time::timeout(deadline, call).await {
        Ok(result) => Ok(result?),
        Err(_) => bail!("no answer within {} s", deadline.as_secs()),
    }
}
