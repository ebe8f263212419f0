//! What each command does, and the exit status it ends with.

use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use jiff::Timestamp;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use tokio::time::{Instant, sleep};
use tracing::{Level, info};

use crate::aws::{Aws, Patience};
use crate::cli::{Cli, Command, ConfigCommand, Format, Output, Selection};
use crate::config::{self, ConfigError};
use crate::control::{Check, Context, REGISTRY, Verdict};
use crate::engine::{self, Outcome};
use crate::host::{Host, files, identity};
use crate::report::{self, Overall, Report, explain, text};
use crate::{gate, journal, readiness};

/// The exit statuses. Frozen: scripts and units depend on them (sysexits.h where it has a value).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// All controls are met.
    Pass = 0,
    /// Something fails.
    Fail = 1,
    /// Nothing fails, but something could not be judged.
    Unknown = 2,
    /// Wrong usage.
    Usage = 64,
    /// An internal error.
    Internal = 70,
    /// Another run is under way.
    Busy = 75,
    /// Not root.
    NotRoot = 77,
    /// The configuration has an error.
    Config = 78,
}

/// The result of the last provisioning run of this boot.
const LAST_RUN: &str = "/run/hostagent/last-run.json";

/// Held while a run is under way.
const LOCK: &str = "/run/hostagent/lock";

/// How long `provision` waits for runs that only look.
const LOCK_PATIENCE: Duration = Duration::from_secs(300);

/// An error that has an exit status of its own.
#[derive(Debug)]
struct Refused(Exit, String);

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.1)
    }
}

impl std::error::Error for Refused {}

/// Runs a command. An error is printed here, once.
#[must_use]
pub fn run(cli: &Cli) -> Exit {
    match std::panic::catch_unwind(|| dispatch(cli)) {
        Ok(Ok(exit)) => exit,
        Ok(Err(e)) => {
            complain(&format!("hostagent: {e:#}\n"));
            match (e.downcast_ref::<Refused>(), e.downcast_ref::<ConfigError>()) {
                (Some(refused), _) => refused.0,
                (_, Some(_)) => Exit::Config,
                _ => Exit::Internal,
            }
        }
        // The panic has printed itself.
        Err(_) => Exit::Internal,
    }
}

/// Prints to standard error; where that cannot be, nobody is there to be told.
fn complain(text: &str) {
    drop(std::io::stderr().lock().write_all(text.as_bytes()));
}

fn dispatch(cli: &Cli) -> Result<Exit> {
    match &cli.command {
        Command::Provision(selection) => looking(cli, selection, "provision"),
        Command::Plan(selection) => looking(cli, selection, "plan"),
        Command::Verify(selection) => looking(cli, selection, "verify"),
        Command::Explain { id, output } => {
            let selection = Selection { only: vec![id.clone()], skip: Vec::new(), output: *output };
            looking(cli, &selection, "explain")
        }
        Command::Gate => {
            must_be_root("gate")?;
            let config = config::load(cli.config.as_deref())?.config;
            match gate::check(&config.volume) {
                Ok(why) => say(&format!("{why}\n")).map(|()| Exit::Pass),
                Err(why) => {
                    complain(&format!("hostagent: Docker may not start: {why:#}\n"));
                    Ok(Exit::Fail)
                }
            }
        }
        Command::Status(output) => status(*output),
        Command::Controls(output) => controls(*output),
        Command::Config(ConfigCommand::Check) => {
            let loaded = config::load(cli.config.as_deref())?;
            let names: Vec<String> = loaded.files.iter().map(|f| f.display().to_string()).collect();
            let read = if names.is_empty() {
                "no file, all defaults".to_owned()
            } else {
                names.join(", ")
            };
            say(&format!("the configuration is valid ({read})\n"))?;
            Ok(Exit::Pass)
        }
    }
}

/// Prints to standard output. A reader that went away is not an error of ours.
fn say(text: &str) -> Result<()> {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => result.context("writing to standard output"),
    }
}

fn must_be_root(command: &str) -> Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    bail!(Refused(Exit::NotRoot, format!("`hostagent {command}` must be run as root")))
}

/// The commands that look at the controls: `verify`, `plan`, `explain` and `provision`.
fn looking(cli: &Cli, selection: &Selection, command: &'static str) -> Result<Exit> {
    let provision = command == "provision";
    let selected = select(selection, provision)?;
    must_be_root(command)?;
    let config = config::load(cli.config.as_deref())?.config;
    journal::init(if provision { Level::INFO } else { Level::ERROR });
    // One thread: hostagent waits far more than it computes, and is to stay small.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the runtime")?;
    let result = runtime.block_on(async {
        let lock = lock(provision).await?;
        let patience = if provision { Patience::Long } else { Patience::Brief };
        let deadline = provision.then(|| Instant::now() + config.run.deadline_seconds.duration());
        let cx = Context { config, host: Host::default(), aws: Aws::new(patience), deadline };
        let mut report = Box::pin(observe(&cx, &selected, command)).await;
        if command == "explain" {
            // What it depends on was looked at, and is not what was asked for.
            report
                .controls
                .retain(|outcome| selection.only.iter().any(|id| id == outcome.about.id));
            report.result = Overall::of(&report.controls);
        }
        // Not held while somebody reads the report at leisure.
        drop(lock);
        say(&match selection.output.format {
            Format::Text if command == "explain" => explain::render(&report),
            Format::Text => text::render(&report),
            Format::Json => report.json(),
        })?;
        Ok(exit(&report))
    });
    // A thread that hangs on a disk is not waited for.
    runtime.shutdown_background();
    result
}

fn exit(report: &Report) -> Exit {
    match report.result {
        Overall::Fail => Exit::Fail,
        Overall::Unknown => Exit::Unknown,
        // Every control is met, and still somebody could not be told.
        Overall::Pass if report.conclusion.as_ref().is_some_and(|c| !c.ready) => Exit::Fail,
        Overall::Pass => Exit::Pass,
    }
}

async fn observe(cx: &Context, selected: &[&'static dyn Check], command: &'static str) -> Report {
    let started = Timestamp::now();
    let complete = selected.len() == REGISTRY.len();
    let elsewhere = not_on_ec2(cx).await;
    let on_ec2 = elsewhere.is_none();
    let outcomes = match elsewhere {
        Some(why) => {
            let verdict = |c: &&'static dyn Check| {
                Outcome::without_facts(c.about(), Verdict::Unknown { why: why.clone() })
            };
            selected.iter().map(verdict).collect()
        }
        None => match command {
            "verify" | "explain" => engine::verify(cx, selected).await,
            "plan" => engine::plan(cx, selected).await,
            _ => provision(cx, selected).await,
        },
    };
    let conclusion = if command == "provision" && complete {
        Some(readiness::conclude(cx, &outcomes).await)
    } else {
        None
    };
    let report = Report {
        version: report::VERSION,
        hostagent: env!("CARGO_PKG_VERSION"),
        command,
        // Not asked once more where nothing answered: a reader waits.
        instance: if on_ec2 { cx.aws.identity().await.ok().cloned() } else { None },
        boot_id: identity::boot_id().ok(),
        started,
        finished: Timestamp::now(),
        complete,
        result: Overall::of(&outcomes),
        conclusion,
        controls: outcomes,
    };
    if report.conclusion.as_ref().is_some_and(|c| c.news)
        && let Err(e) = files::write_atomic(Path::new(LAST_RUN), &report.json(), 0o644)
    {
        tracing::error!("the result is not kept for `hostagent status`: {e:#}");
    }
    report
}

/// Applies, and judges everything once more from fresh facts: nothing trusts an apply.
async fn provision(cx: &Context, selected: &[&'static dyn Check]) -> Vec<Outcome> {
    let applied = engine::provision(cx, selected).await;
    cx.host.ahead.abandon().await;
    if applied.iter().any(|o| !o.verdict.lets_through()) {
        return applied;
    }
    info!("every control is met; judging all of them once more");
    let mut last = engine::verify(cx, selected).await;
    for (last, applied) in last.iter_mut().zip(applied) {
        last.steps = applied.steps;
    }
    last
}

/// Why nothing can be judged, on a machine that is no EC2 instance.
async fn not_on_ec2(cx: &Context) -> Option<String> {
    let Err(e) = cx.aws.identity().await else { return None };
    // The metadata service can be silent for a while on EC2 too: then the firmware knows better.
    if identity::firmware().is_ok_and(|f| f.is_ec2()) {
        return None;
    }
    Some(format!("this machine is not known to be an EC2 instance: {e:#}"))
}

/// The selected controls, with what they require, in the registry's order.
fn select(selection: &Selection, provision: bool) -> Result<Vec<&'static dyn Check>> {
    let known = |id: &str| REGISTRY.iter().any(|c| c.about().id == id);
    if let Some(id) = selection.only.iter().chain(&selection.skip).find(|id| !known(id)) {
        bail!(Refused(
            Exit::Usage,
            format!("there is no control {id:?}; see `hostagent controls`")
        ));
    }
    let mut wanted: Vec<&str> = if selection.only.is_empty() {
        REGISTRY.iter().map(|c| c.about().id).collect()
    } else {
        selection.only.iter().map(String::as_str).collect()
    };
    // Prerequisites stand before what needs them: one pass from the back takes them all in.
    for control in REGISTRY.iter().rev() {
        if wanted.contains(&control.about().id) {
            wanted.extend(control.about().requires);
            // Without these its steps would not be applied.
            if provision {
                wanted.extend(control.about().acts_after);
            }
        }
    }
    let selected: Vec<&'static dyn Check> = REGISTRY
        .iter()
        .copied()
        .filter(|c| wanted.contains(&c.about().id))
        .filter(|c| !selection.skip.iter().any(|id| id == c.about().id))
        .collect();
    if selected.is_empty() {
        bail!(Refused(Exit::Usage, "no control is left to look at".to_owned()));
    }
    Ok(selected)
}

/// One run at a time: `provision` excludes everything, looking excludes only `provision`, which
/// waits for those who look.
async fn lock(exclusive: bool) -> Result<Option<Flock<File>>> {
    let path = Path::new(LOCK);
    let file = if exclusive {
        let dir = path.parent().unwrap_or(Path::new("/run"));
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(dir)
            .with_context(|| format!("making {}", dir.display()))?;
        OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path)
    } else {
        match File::open(path) {
            // No run has changed anything in this boot yet, and looking leaves nothing behind.
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            result => result,
        }
    };
    let mut file = file.with_context(|| format!("opening {LOCK}"))?;
    let busy = || {
        let text =
            format!("another run of hostagent holds {LOCK}; see `systemctl status hostagent`");
        anyhow!(Refused(Exit::Busy, text))
    };
    let until = Instant::now() + LOCK_PATIENCE;
    loop {
        if exclusive {
            file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(Some(lock)),
                Err((unlocked, Errno::EWOULDBLOCK)) => unlocked,
                Err((_, e)) => return Err(e).with_context(|| format!("locking {LOCK}")),
            };
        }
        // A lock that can be shared is held by those who look.
        match Flock::lock(file, FlockArg::LockSharedNonblock) {
            Ok(lock) if !exclusive => return Ok(Some(lock)),
            Ok(lock) if Instant::now() < until => {
                file = lock
                    .unlock()
                    .map_err(|(_, e)| e)
                    .with_context(|| format!("unlocking {LOCK}"))?;
            }
            Ok(_) | Err((_, Errno::EWOULDBLOCK)) => return Err(busy()),
            Err((_, e)) => return Err(e).with_context(|| format!("locking {LOCK}")),
        }
        sleep(Duration::from_millis(200)).await;
    }
}

fn status(output: Output) -> Result<Exit> {
    let marker = readiness::marker()?;
    let last: Option<serde_json::Value> = match files::read_optional(Path::new(LAST_RUN))? {
        Some(text) => {
            Some(serde_json::from_str(&text).with_context(|| format!("reading {LAST_RUN}"))?)
        }
        None => None,
    };
    let exit = match (&marker, &last) {
        (Some(_), _) => Exit::Pass,
        (None, Some(_)) => Exit::Fail,
        (None, None) => Exit::Unknown,
    };
    if output.format == Format::Json {
        let value = serde_json::json!({
            "version": report::VERSION,
            "ready": marker.is_some(),
            "since": marker.map(|m| m.since),
            "last_run": last,
        });
        say(&format!("{value:#}\n"))?;
        return Ok(exit);
    }
    let mut out = match (&marker, &last) {
        (Some(marker), _) => format!("ready since {:.0}\n", marker.since),
        (None, Some(_)) => "not ready\n".to_owned(),
        (None, None) => "not ready: hostagent has not run since this host booted\n".to_owned(),
    };
    if let Some(last) = last.filter(|_| marker.is_none()) {
        let text = |value: &serde_json::Value| value.as_str().unwrap_or("unknown").to_owned();
        _ = writeln!(out, "last run {} ended {}", text(&last["command"]), text(&last["finished"]));
        if let Some(trouble) = last["trouble"].as_str() {
            _ = writeln!(out, "  {trouble}");
        }
        for control in last["controls"].as_array().into_iter().flatten() {
            let verdict = &control["verdict"];
            if let "fail" | "unknown" = verdict["status"].as_str().unwrap_or("unknown") {
                let sentence = verdict.get("observed").or(verdict.get("why")).unwrap_or(verdict);
                _ = writeln!(
                    out,
                    "  {} {}: {}",
                    text(&verdict["status"]),
                    text(&control["id"]),
                    text(sentence)
                );
            }
        }
    }
    say(&out)?;
    Ok(exit)
}

fn controls(output: Output) -> Result<Exit> {
    let abouts: Vec<_> = REGISTRY.iter().map(|c| c.about()).collect();
    if output.format == Format::Json {
        say(&(serde_json::to_string_pretty(&abouts).context("listing the controls")? + "\n"))?;
        return Ok(Exit::Pass);
    }
    let width = abouts.iter().map(|a| a.id.len()).max().unwrap_or(0);
    let mut out = String::new();
    for about in abouts {
        _ = writeln!(out, "{:<width$}  {}", about.id, about.title);
    }
    say(&out)?;
    Ok(Exit::Pass)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::control::{About, Plan, Unknown};
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn selection(only: &[&str], skip: &[&str]) -> Selection {
        let own = |ids: &[&str]| ids.iter().map(|s| (*s).to_owned()).collect();
        Selection { only: own(only), skip: own(skip), output: Output { format: Format::Text } }
    }

    fn ids(only: &[&str], skip: &[&str]) -> Vec<&'static str> {
        select(&selection(only, skip), false).unwrap().iter().map(|c| c.about().id).collect()
    }

    /// Met when it is looked at first, as a volume that is unmounted between apply and signal, and
    /// never again.
    struct Fleeting(AtomicUsize);

    impl crate::control::Control for Fleeting {
        type Facts = usize;

        const ABOUT: About =
            About { id: "fleeting", title: "", why: "", requires: &[], acts_after: &[] };

        async fn observe(&self, _: &Context) -> usize {
            self.0.fetch_add(1, Ordering::SeqCst)
        }

        fn judge(&self, _: &Config, seen: &usize) -> Result<Verdict, Unknown> {
            Ok(match seen {
                0 => Verdict::pass("it is there"),
                _ => Verdict::fail("it there", "it is gone", ""),
            })
        }

        fn plan(&self, _: &Config, _: &usize) -> Result<Plan, Unknown> {
            Ok(Plan::Nothing)
        }
    }

    #[tokio::test]
    async fn what_was_met_and_is_not_any_more_is_seen_before_ready_is_said() {
        static FLEETING: Fleeting = Fleeting(AtomicUsize::new(0));
        let cx = Context {
            config: Config::default(),
            host: Host::default(),
            aws: Aws::new(Patience::Brief),
            deadline: None,
        };
        let outcomes = provision(&cx, &[&FLEETING]).await;
        assert_eq!(FLEETING.0.load(Ordering::SeqCst), 2, "looked at afresh");
        assert_eq!(outcomes[0].verdict.word(), "fail");
        assert!(!outcomes[0].verdict.lets_through());
    }

    #[test]
    fn a_selection_brings_its_prerequisites() {
        assert_eq!(ids(&[], &[]).len(), REGISTRY.len());
        assert_eq!(ids(&["data-mount"], &[]), ["data-volume", "data-filesystem", "data-mount"]);
        assert_eq!(ids(&["sshd-port"], &[]), ["sshd-port"]);
        assert!(!ids(&[], &["sshd-port"]).contains(&"sshd-port"));
    }

    #[test]
    fn nothing_and_nonsense_are_wrong_usage() {
        for (only, skip) in [(&["sshd-port"][..], &["sshd-port"][..]), (&["x"], &[]), (&[], &["x"])]
        {
            let error = select(&selection(only, skip), false).map(|_| ()).unwrap_err();
            assert_eq!(error.downcast_ref::<Refused>().unwrap().0, Exit::Usage);
        }
    }
}
