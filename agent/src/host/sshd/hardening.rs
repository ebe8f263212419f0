//! What sshd is told about logins and algorithms, and the change of that as a transaction.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};
use tracing::warn;

use super::lines::matches;
use super::{
    Answer, PRIVILEGE_SEPARATION, SERVICE, SOCKET, accounts, effective, knock, options, revive,
};
use crate::host::systemd::Systemd;
use crate::host::{command, files};

/// Our file among sshd's. Of these keywords the first value counts, so it is to be read first.
pub const DROP_IN: &str = "/etc/ssh/sshd_config.d/00-hostagent-hardening.conf";

/// Where the new configuration is tried before it is put in place.
const TRIAL: &str = "/run/hostagent/sshd-trial.conf";

/// How long sshd may take to answer after it was told to reload.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);

/// How long one job of systemd's may take.
const JOB_DEADLINE: Duration = Duration::from_secs(60);

/// A keyword of sshd's, and the value that it is to have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// The keyword.
    pub keyword: String,
    /// The value as it is written: a list that begins with `-` is what the defaults lose.
    pub value: String,
}

/// What `sshd -T` says is in effect for a connection (`-C` in sshd(8)): each keyword in lower case with
/// its value; the values of one that it says more than once are joined by spaces.
pub async fn settings(systemd: &Systemd, connection: &str) -> Result<BTreeMap<String, String>> {
    let settings = parse(&options::ask(systemd, connection).await?);
    ensure!(settings.contains_key("passwordauthentication"), "`sshd -T` says too little");
    Ok(settings)
}

fn parse(text: &str) -> BTreeMap<String, String> {
    let mut settings = BTreeMap::<String, String>::new();
    for line in text.lines() {
        let (keyword, value) = line.split_once(' ').unwrap_or((line, ""));
        let known = settings.entry(keyword.to_ascii_lowercase()).or_default();
        if !known.is_empty() {
            known.push(' ');
        }
        known.push_str(value.trim());
    }
    settings
}

/// Our file, with these settings.
fn drop_in(wanted: &[Setting]) -> String {
    let mut text = "# Written by hostagent (control sshd-hardening); [sshd] hardening in \
                    hostagent.toml decides.\n"
        .to_owned();
    for Setting { keyword, value } in wanted {
        // Writing to a String cannot fail.
        _ = writeln!(text, "{keyword} {value}");
    }
    text
}

/// The settings of our file as it is.
pub fn ours() -> Result<Vec<Setting>> {
    Ok(read_back(&files::read_optional(Path::new(DROP_IN))?.unwrap_or_default()))
}

fn read_back(text: &str) -> Vec<Setting> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let words = lines.filter_map(|line| line.trim().split_once(' '));
    words
        .map(|(keyword, value)| Setting { keyword: keyword.into(), value: value.trim().into() })
        .collect()
}

/// Whether a setting is in effect.
fn holds(wanted: &Setting, settings: &BTreeMap<String, String>) -> bool {
    let Some(is) = settings.get(&wanted.keyword.to_ascii_lowercase()) else { return false };
    if let Some(patterns) = wanted.value.strip_prefix('-') {
        let lost = |name: &str| patterns.split(',').any(|p| matches(p.as_bytes(), name.as_bytes()));
        return !is.is_empty() && !is.split(',').any(lost);
    }
    // The older name of this value, which `sshd -T` still says.
    let value =
        if wanted.value == "prohibit-password" { "without-password" } else { &wanted.value };
    is.eq_ignore_ascii_case(value) || is.eq_ignore_ascii_case(&wanted.value)
}

/// Makes these settings the first that sshd reads. If sshd does not accept them, they do not take
/// effect or it does not answer as before, everything is put back.
///
/// `passwords` says that logins with passwords end with it: then that locks nobody out must hold now.
pub async fn harden(systemd: &Systemd, wanted: &[Setting], passwords: bool) -> Result<()> {
    let path = Path::new(DROP_IN);
    files::make_directories(Path::new(PRIVILEGE_SEPARATION), 0o755)?;
    if passwords {
        let doing = "passwords are not turned off";
        if let Err(why) = accounts::look(systemd).await?.way_in() {
            bail!("{doing}: {why}");
        }
        // A reload keeps the command line, which may take away the key that this rests on.
        if let Some(told) = options::running(systemd).await.context(doing)? {
            bail!("{doing}: {}", options::runs_otherwise(&told));
        }
    }
    let before = files::read_optional(path)?;
    let mut doors = Vec::new();
    let now = effective(systemd).await?;
    for port in now.ports() {
        for door in now.doors(port) {
            if let Ok(Answer::Banner(_)) = knock(door).await {
                doors.push(door);
            }
        }
    }
    ensure!(!doors.is_empty(), "sshd does not answer, and is left as it is");

    let text = drop_in(wanted);
    try_out(&text).await?;
    let result = async {
        files::write_atomic(path, &text, 0o644)?;
        let settings = settings(systemd, options::NOBODYS).await?;
        if let Some(unmet) = wanted.iter().find(|wanted| !holds(wanted, &settings)) {
            bail!(
                "{} does not become {}: something is read before {DROP_IN}, or it is not included, or \
                 the command line outdoes it: {}",
                unmet.keyword,
                unmet.value,
                options::WHERE
            );
        }
        renew(systemd).await?;
        answers(&doors).await
    }
    .await;
    let Err(error) = result else { return Ok(()) };

    warn!(control = "sshd-hardening", "undoing the change to sshd: {error:#}");
    let undo = async {
        let restored = match &before {
            Some(text) => files::write_atomic(path, text, 0o644),
            None => files::remove(path),
        };
        // Also where that failed: a daemon is better than none.
        let renewed = renew(systemd).await;
        revive(systemd, renewed, || answers(&doors)).await?;
        restored
    };
    match undo.await {
        Ok(()) => Err(error.context("sshd is as it was before")),
        Err(undoing) => Err(error.context(format!(
            "bringing sshd back failed too ({undoing:#}); do not close your session"
        ))),
    }
}

/// Has sshd check the whole configuration with our file in front, before that is in place: what sshd
/// does not accept would keep it from starting after a power cut.
async fn try_out(text: &str) -> Result<()> {
    let path = Path::new(TRIAL);
    files::write_atomic(path, &format!("{text}Include {}\n", super::lines::MAIN), 0o600)?;
    let tried = command::run(command::SSHD, &["-t", "-f", TRIAL], Duration::from_secs(30)).await;
    files::remove(path)?;
    tried?.success().context("sshd does not accept the new configuration").map(drop)
}

/// Makes sshd read its configuration. Behind a socket the service is stopped: PID 1 goes on listening,
/// and starts it anew for the next connection. Open sessions go on either way.
async fn renew(systemd: &Systemd) -> Result<()> {
    if !systemd.unit(SOCKET).await?.is_up() {
        return systemd.reload(SERVICE, JOB_DEADLINE).await;
    }
    if systemd.unit(SERVICE).await?.is_up() {
        systemd.stop(SERVICE, JOB_DEADLINE).await?;
    }
    systemd.forget_failure(SERVICE).await;
    Ok(())
}

/// Waits until sshd answers at these addresses.
async fn answers(doors: &[SocketAddr]) -> Result<()> {
    let until = Instant::now() + ANSWER_DEADLINE;
    // A reload is over before sshd has begun anew, and until then the old one answers.
    for door in doors {
        loop {
            match knock(*door).await {
                Ok(Answer::Banner(_)) => break,
                other if Instant::now() > until => {
                    bail!("sshd does not answer on {door}: {other:?}")
                }
                _ => sleep(Duration::from_millis(500)).await,
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setting(keyword: &str, value: &str) -> Setting {
        Setting { keyword: keyword.into(), value: value.into() }
    }

    #[test]
    fn what_sshd_says_is_read() {
        let settings =
            parse("port 22\nallowusers a\nallowusers b\nbanner none\nX11Forwarding yes\nx\n");
        assert_eq!(settings["allowusers"], "a b");
        assert_eq!(settings["x11forwarding"], "yes");
        assert_eq!(settings["x"], "");
    }

    #[test]
    fn our_file_is_read_back() {
        let wanted = [setting("MaxAuthTries", "4"), setting("MACs", "-umac-64*,*sha1*")];
        let text = drop_in(&wanted);
        assert!(text.ends_with("\nMaxAuthTries 4\nMACs -umac-64*,*sha1*\n"), "{text}");
        assert_eq!(read_back(&text), wanted);
        assert!(read_back("").is_empty());
    }

    #[test]
    fn a_setting_holds_only_if_it_is_in_effect() {
        let settings = parse(
            "permitrootlogin without-password\nmaxauthtries 4\nmacs hmac-sha2-256,umac-128\nciphers \n",
        );
        let holds = |keyword, value| holds(&setting(keyword, value), &settings);
        assert!(holds("PermitRootLogin", "prohibit-password"));
        assert!(!holds("PermitRootLogin", "no"));
        assert!(holds("MaxAuthTries", "4") && !holds("MaxAuthTries", "6"));
        assert!(holds("MACs", "-umac-64*,*sha1*") && !holds("MACs", "-umac-1*"));
        assert!(!holds("Ciphers", "-*-cbc"), "nothing left is nothing to log in with");
        assert!(!holds("X11Forwarding", "no"), "what is not said does not hold");
    }
}
