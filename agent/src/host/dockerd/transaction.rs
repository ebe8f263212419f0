//! The change of Docker's configuration file: tried before it is in place, put in place whole, and
//! taken back when Docker does not come up with it.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde::Serialize;
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use super::json::{Object, Setting};
use super::{SERVICE, SOCKET, config_path, flags, is_dockerd};
use crate::host::command_line::words_of_unit;
use crate::host::systemd::Systemd;
use crate::host::{command, engine_api, files, processes};

/// Where the new configuration is tried before it is put in place.
const TRIAL: &str = "/run/hostagent/daemon-trial.json";

/// How long Docker may take to check a configuration.
const TRIAL_DEADLINE: Duration = Duration::from_secs(60);

/// How long one job of systemd's may take.
const JOB_DEADLINE: Duration = Duration::from_secs(300);

/// How long Docker may take to answer after it was started, or told to reload.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);

const CONTROL: &str = "docker-daemon";

/// How Docker takes the change up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Then {
    /// At its next start, whenever that is.
    Leave,
    /// It reads the file again, as far as it does so while it runs. Containers go on.
    Reload,
    /// It is down, and is started.
    Start,
    /// It is stopped and started.
    Restart,
}

/// Changes the file and has Docker take it up. With no setting, only the latter.
///
/// `stop_containers` says whether containers that run may be stopped for a restart.
pub async fn configure(
    systemd: &Systemd,
    settings: &[Setting],
    then: Then,
    stop_containers: bool,
) -> Result<()> {
    if then == Then::Restart && !stop_containers {
        let containers = processes::containers()?;
        ensure!(containers.is_empty(), "containers run: {}", containers.join(", "));
    }
    let words = words_of_unit(systemd, SERVICE).await?;
    let path = config_path(&flags::parse(&words));
    let before = files::read_bytes(&path)?;
    let leads_nowhere = before.is_none() && path.is_symlink();
    ensure!(!leads_nowhere, "{} is a link that leads nowhere", path.display());
    if !settings.is_empty() {
        let text = changed(before.as_deref().unwrap_or_default(), settings)
            .with_context(|| format!("changing {}", path.display()))?;
        try_out(&words, &text).await?;
        put(&path, before.is_some(), text.as_bytes())?;
    }
    let Err(error) = take_up(systemd, then).await else { return Ok(()) };
    if settings.is_empty() {
        return Err(error);
    }

    warn!(control = CONTROL, "undoing the change to {}: {error:#}", path.display());
    let undo = async {
        match &before {
            Some(bytes) => put(&path, true, bytes)?,
            None => files::remove(&path)?,
        }
        match then {
            Then::Leave => Ok(()),
            Then::Reload => systemd.reload(SERVICE, JOB_DEADLINE).await,
            // It may run with the new file, and hang.
            Then::Start | Then::Restart => afresh(systemd).await,
        }
    };
    let path = path.display();
    Err(match undo.await {
        Ok(()) => error.context(format!("{path} is as it was before, and Docker with it")),
        Err(undoing) => error
            .context(format!("Docker does not come back with the old {path} either ({undoing:#})")),
    })
}

fn changed(before: &[u8], settings: &[Setting]) -> Result<String> {
    let mut object = Object::parse(std::str::from_utf8(before)?)?;
    for setting in settings {
        object.apply(setting)?;
    }
    Ok(object.render())
}

/// The file is somebody's, if there is one: its mode and its owner stay.
fn put(path: &Path, exists: bool, content: &[u8]) -> Result<()> {
    if exists {
        return files::rewrite(path, content);
    }
    files::write_atomic(path, std::str::from_utf8(content)?, 0o644)
}

/// Has Docker check the file together with the flags of its unit. What it does not accept would keep
/// it from starting after a power cut.
async fn try_out(words: &[String], text: &str) -> Result<()> {
    let Some(program) = words.first().filter(|_| is_dockerd(words)) else {
        info!(control = CONTROL, "{SERVICE} does not start dockerd itself: tried by starting it");
        return Ok(());
    };
    let path = Path::new(TRIAL);
    files::write_atomic(path, text, 0o600)?;
    let mut args = vec!["--validate".to_owned(), "--config-file".to_owned(), TRIAL.to_owned()];
    args.extend(flags_for_trial(words));
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let tried = command::run(program, &args, TRIAL_DEADLINE).await;
    files::remove(path)?;
    let tried = tried?;
    if tried.code != Some(0) && tried.stderr.contains("unknown flag: --validate") {
        // Before version 23.0.
        info!(control = CONTROL, "this Docker cannot check a configuration: tried by starting it");
        return Ok(());
    }
    tried.success().context("Docker does not accept the new configuration").map(drop)
}

/// The flags of a command line but the name of the file, and what may be a secret: it would be told in
/// an error.
fn flags_for_trial(words: &[String]) -> Vec<String> {
    let left_out = ["config-file", "log-opt", "label", "http-proxy", "https-proxy"];
    flags::parse(words)
        .into_iter()
        .filter(|flag| !left_out.contains(&flag.name.as_str()))
        .map(|flag| match flag.value.as_str() {
            "" => format!("--{}", flag.name),
            value => format!("--{}={value}", flag.name),
        })
        .collect()
}

async fn take_up(systemd: &Systemd, then: Then) -> Result<()> {
    match then {
        Then::Leave => return Ok(()),
        Then::Reload => systemd.reload(SERVICE, JOB_DEADLINE).await?,
        Then::Start => systemd.start(SERVICE, JOB_DEADLINE).await?,
        Then::Restart => restart(systemd).await?,
    }
    // The only thing for which Docker is told to reload.
    let wanted = (then == Then::Reload).then_some(true);
    let until = Instant::now() + ANSWER_DEADLINE;
    loop {
        // A reload is over before Docker has read the file.
        let answer = engine_api::in_force().await;
        match &answer {
            Ok(seen) if wanted.is_none() || seen.live_restore == wanted => return Ok(()),
            Ok(_) if Instant::now() > until => bail!("Docker does not take the new file up"),
            Err(e) if Instant::now() > until => bail!("Docker does not answer: {e:#}"),
            _ => sleep(Duration::from_millis(500)).await,
        }
    }
}

/// Also one that was started so often in the last minute that systemd would not do it again.
async fn afresh(systemd: &Systemd) -> Result<()> {
    systemd.forget_failure(SERVICE).await;
    systemd.restart(SERVICE, JOB_DEADLINE).await
}

/// Containers that outlive Docker would keep what they were started with, and Docker's networks as they
/// were: those that may be stopped are.
async fn restart(systemd: &Systemd) -> Result<()> {
    if processes::containers()?.is_empty() {
        return afresh(systemd).await;
    }
    for unit in [SOCKET, SERVICE] {
        if systemd.unit(unit).await?.is_up() {
            systemd.stop(unit, JOB_DEADLINE).await?;
        }
    }
    processes::stop_containers().await?;
    systemd.start(SERVICE, JOB_DEADLINE).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_file_of_somebodys_keeps_its_mode_and_a_missing_one_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("docker/daemon.json");
        let settings = [Setting { key: "icc".into(), value: Some(json!(false)) }];
        let text = changed(b"", &settings).unwrap();
        put(&path, false, text.as_bytes()).unwrap();
        let mode = |mode: u32| std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(&path, mode(0o640)).unwrap();
        put(&path, true, b"{}").unwrap();
        let meta = std::fs::metadata(&path).unwrap();
        assert_eq!(meta.permissions().mode() & 0o777, 0o640);
        assert!(changed(b"{", &settings).is_err() && changed(b"\xff", &settings).is_err());
    }

    #[test]
    fn the_trial_has_the_units_flags_and_no_secret() {
        let line = "/usr/sbin/dockerd -H fd:// --config-file /x.json --log-opt splunk-token=secret \
                    --icc=false --live-restore";
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        assert_eq!(flags_for_trial(&words), ["--host=fd://", "--icc=false", "--live-restore"]);
    }
}
