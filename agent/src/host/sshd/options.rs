//! What sshd is told besides its files, on its command line, where it outdoes every file: the units of
//! Debian and Ubuntu have `$SSHD_OPTS` from `/etc/default/ssh` there (`sshd -D $SSHD_OPTS`), and a
//! drop-in may have anything. `sshd -T` knows of it only if it is told the same.

use std::fmt::Write as _;
use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

use super::{SERVICE, lines};
use crate::host::command;
use crate::host::command_line::{words_of_process, words_of_unit};
use crate::host::systemd::Systemd;

/// Where to look for what is on the command line.
pub const WHERE: &str =
    "SSHD_OPTS in /etc/default/ssh, or ExecStart= of ssh.service (`systemctl cat ssh.service`)";

/// The flags that stand for something in the configuration (sshd(8)).
const CONFIGURING: &str = "46Ccfhop";

/// The flags that are followed by a value.
const VALUED: &str = "CEbcfghkopu";

/// The keywords, in lower case, that say where sshd listens.
const LISTENING: [&str; 3] = ["addressfamily", "listenaddress", "port"];

/// An option that stands for something in the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    /// The flag, without its dash.
    pub flag: char,
    /// Its value; empty for a flag that has none.
    pub value: String,
}

impl std::fmt::Display for Told {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "-{} {}", self.flag, self.value)
    }
}

impl Told {
    /// The keyword that it sets, in lower case.
    #[must_use]
    pub fn keyword(&self) -> Option<String> {
        let end = self.value.find(|c: char| c == '=' || c.is_whitespace());
        let keyword = &self.value[..end.unwrap_or(self.value.len())];
        (self.flag == 'o').then(|| keyword.to_ascii_lowercase())
    }

    /// Whether it has a say in where sshd listens: another configuration file has one, too.
    #[must_use]
    pub fn listens(&self) -> bool {
        match self.flag {
            '4' | '6' | 'f' | 'p' => true,
            _ => self.keyword().is_some_and(|keyword| LISTENING.contains(&keyword.as_str())),
        }
    }
}

/// What sshd is told at its next start. An error where that cannot be seen: where something else than
/// [`command::SSHD`] is started, and where systemd has not read what is in the unit's files.
pub async fn at_start(systemd: &Systemd) -> Result<Vec<Told>> {
    Ok(parse(&words_at_start(systemd).await?))
}

async fn words_at_start(systemd: &Systemd) -> Result<Vec<String>> {
    let words = words_of_unit(systemd, SERVICE).await?;
    let Some(program) = words.first() else { return Ok(words) };
    let real = |path: &str| fs::canonicalize(path).with_context(|| format!("looking for {path}"));
    ensure!(
        real(program)? == real(command::SSHD)?,
        "{SERVICE} starts {program}; what it tells sshd cannot be seen"
    );
    ensure!(
        !systemd.unit(SERVICE).await?.need_daemon_reload,
        "the files of {SERVICE} changed since systemd read them; run `systemctl daemon-reload`"
    );
    Ok(words)
}

/// What the sshd that runs was told, where it is something else than at the next start; none also
/// where none runs.
pub async fn running(systemd: &Systemd) -> Result<Option<Vec<Told>>> {
    let at_start = words_at_start(systemd).await?;
    let pid = systemd.unit(SERVICE).await?.main_pid;
    if pid == 0 {
        return Ok(None);
    }
    let words = words_of_title(&words_of_process(pid)?)?;
    let running = parse(&words);
    // The title does not tell a space within a word from one between two.
    let line = at_start.join(" ");
    let same = [encoded(&line), line].iter().any(|line| parse(&split(line)) == running);
    Ok((!same).then_some(running))
}

/// A text as it is in the title of a process (openbsd-compat/setproctitle.c: vis(3) with `VIS_CSTYLE`,
/// `VIS_NL`, `VIS_TAB` and `VIS_OCTAL`).
fn encoded(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        match byte {
            b'\\' => out += "\\\\",
            b'\t' => out += "\\t",
            b'\n' => out += "\\n",
            b' '..=b'~' => out.push(char::from(byte)),
            // Writing to a String cannot fail.
            other => _ = write!(out, "\\{other:03o}"),
        }
    }
    out
}

/// The words of sshd's command line from what it has made of it (sshd.c, `prepare_proctitle`):
/// `sshd: /usr/sbin/sshd -D [listener] 0 of 10-100 startups`.
fn words_of_title(words: &[String]) -> Result<Vec<String>> {
    let title = words.join(" ");
    let Some(rest) = title.strip_prefix("sshd: ") else { return Ok(split(&title)) };
    let (line, _) = rest
        .rsplit_once(" [listener]")
        .with_context(|| format!("sshd does not show how it was started: {title:?}"))?;
    Ok(split(line))
}

fn split(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

/// Another file than [`lines::MAIN`] that sshd is told to read.
#[must_use]
pub fn other_file(told: &[Told]) -> Option<&str> {
    let file = told.iter().rev().find(|told| told.flag == 'f')?;
    (file.value != lines::MAIN).then_some(file.value.as_str())
}

/// What is wrong where sshd runs with other options than it would start with.
#[must_use]
pub fn runs_otherwise(told: &[Told]) -> String {
    let with = if told.is_empty() { "no option".to_owned() } else { list(told) };
    format!("sshd runs with {with}, and would start with something else now: restart ssh.service")
}

/// Options as people read them.
#[must_use]
pub fn list(told: &[Told]) -> String {
    told.iter().map(|told| format!("`{told}`")).collect::<Vec<_>>().join(", ")
}

/// A connection that no `Match` line is about, but for `Match all`: what is not said of it matches
/// nothing. Only the port must be said, for OpenSSH 9.6 takes it for known: one that nobody uses.
pub const NOBODYS: &str = "lport=1";

/// Asks sshd what would be in effect for a connection (`-C` in sshd(8)), options included. What stands
/// behind `Match` outdoes what stands before it: for a connection that something matches, the answer
/// says nothing of others.
pub async fn ask(systemd: &Systemd, connection: &str) -> Result<String> {
    let mut args = vec!["-T".to_owned(), "-C".to_owned(), connection.to_owned()];
    for Told { flag, value } in at_start(systemd).await? {
        args.push(format!("-{flag}"));
        args.extend((!value.is_empty()).then_some(value));
    }
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    command::run(command::SSHD, &args, Duration::from_secs(30)).await?.success()
}

/// The options that count, of a command line whose first word is the program.
fn parse(words: &[String]) -> Vec<Told> {
    let mut words = words.iter().skip(1);
    let mut told = Vec::new();
    while let Some(word) = words.next() {
        // `-p22`, `-p 22`, `-4p 22`
        let mut flags = word.strip_prefix('-').unwrap_or_default().chars();
        while let Some(flag) = flags.next() {
            let valued = VALUED.contains(flag);
            let value = match flags.as_str() {
                _ if !valued => "",
                "" => words.next().map_or("", String::as_str),
                rest => rest,
            };
            if CONFIGURING.contains(flag) {
                told.push(Told { flag, value: value.to_owned() });
            }
            if valued {
                break;
            }
        }
    }
    told
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(line: &str) -> Vec<Told> {
        parse(&split(&format!("/usr/sbin/sshd -D {line}")))
    }

    #[test]
    fn options_are_read_as_sshd_reads_them() {
        let texts = |line: &str| {
            told(line).iter().map(|told| told.to_string().trim_end().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(texts(""), Vec::<String>::new());
        assert_eq!(texts("-p 22"), ["-p 22"]);
        assert_eq!(texts("-p22 -4"), ["-p 22", "-4"]);
        assert_eq!(texts("-D4p 22"), ["-4", "-p 22"]);
        // What says nothing of the configuration, and values that look like flags.
        assert_eq!(texts("-e -q -u0 -E -p"), Vec::<String>::new());
        assert_eq!(
            texts("-oPort=22 -o PasswordAuthentication=yes"),
            ["-o Port=22", "-o PasswordAuthentication=yes"]
        );
    }

    #[test]
    fn what_has_a_say_in_where_sshd_listens() {
        let listens = |line: &str| told(line)[0].listens();
        for text in ["-p 22", "-4", "-6", "-f /etc/other", "-oPort=22", "-o ListenAddress=::"] {
            assert!(listens(text), "{text}");
        }
        assert!(listens("-o addressfamily=inet"));
        assert!(!listens("-o PortOfCall=22"));
        assert!(!listens("-o PasswordAuthentication=yes"));
        assert!(!listens("-h /etc/key"));
    }

    #[test]
    fn the_last_file_counts() {
        assert_eq!(other_file(&told("-p 22")), None);
        assert_eq!(other_file(&told("-f /etc/other")), Some("/etc/other"));
        assert_eq!(other_file(&told("-f /etc/other -f /etc/ssh/sshd_config")), None);
    }

    #[test]
    fn the_title_of_the_process_is_read() {
        let words = |title: &str| words_of_title(&[title.to_owned()]);
        let listener =
            "sshd: /usr/sbin/sshd -D -o Banner=[listener] [listener] 0 of 10-100 startups";
        let expected = ["/usr/sbin/sshd", "-D", "-o", "Banner=[listener]"];
        assert_eq!(words(listener).unwrap(), expected);
        // Before it has made a title, and one that is cut short.
        let raw = ["/usr/sbin/sshd".to_owned(), "-D".to_owned()];
        assert_eq!(words_of_title(&raw).unwrap(), raw);
        assert!(words("sshd: /usr/sbin/sshd -D [list").is_err());
        assert_eq!(encoded("a\\b\t\u{e9} x"), r"a\\b\t\303\251 x");
    }
}
