//! What sshd is told besides its files: the units of Debian and Ubuntu put `$SSHD_OPTS` from
//! `/etc/default/ssh` on its command line (`sshd -D $SSHD_OPTS`), where it outdoes every file.
//! `sshd -T` knows of it only if it is told the same.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::host::{command, files};

/// Where the options are set.
pub const DEFAULTS: &str = "/etc/default/ssh";

/// The variable there.
const VARIABLE: &str = "SSHD_OPTS";

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
    /// Whether it has a say in where sshd listens: another configuration file has one, too.
    #[must_use]
    pub fn listens(&self) -> bool {
        match self.flag {
            '4' | '6' | 'f' | 'p' => true,
            'o' => {
                let end = self.value.find(|c: char| c == '=' || c.is_whitespace());
                let keyword = &self.value[..end.unwrap_or(self.value.len())];
                LISTENING.contains(&keyword.to_ascii_lowercase().as_str())
            }
            _ => false,
        }
    }
}

/// What `/etc/default/ssh` has for the next start of sshd.
pub fn told() -> Result<Vec<Told>> {
    Ok(parse(&files::read_optional(Path::new(DEFAULTS))?.unwrap_or_default()))
}

/// Asks sshd what would be in effect for a connection (`-C` in sshd(8)), options included.
pub async fn ask(connection: &str) -> Result<String> {
    let mut args = vec!["-T".to_owned(), "-C".to_owned(), connection.to_owned()];
    for Told { flag, value } in told()? {
        args.push(format!("-{flag}"));
        args.extend((!value.is_empty()).then_some(value));
    }
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    command::run(command::SSHD, &args, Duration::from_secs(30)).await?.success()
}

/// Reads a file of variables (`EnvironmentFile=` in systemd.exec(5)): the last one of the name counts.
fn parse(text: &str) -> Vec<Told> {
    let value = |line: &str| {
        let (name, value) = line.trim().split_once('=')?;
        (name.trim_end() == VARIABLE).then(|| unquoted(value.trim()).to_owned())
    };
    let options = text.lines().filter_map(value).next_back().unwrap_or_default();
    let mut words = options.split_whitespace();
    let mut told = Vec::new();
    while let Some(word) = words.next() {
        // `-p22`, `-p 22`, `-4p 22`
        let mut flags = word.strip_prefix('-').unwrap_or_default().chars();
        while let Some(flag) = flags.next() {
            let valued = VALUED.contains(flag);
            let value = match flags.as_str() {
                _ if !valued => "",
                "" => words.next().unwrap_or_default(),
                rest => rest,
            };
            if CONFIGURING.contains(flag) {
                told.push(Told { flag, value: unquoted(value).to_owned() });
            }
            if valued {
                break;
            }
        }
    }
    told
}

/// A text without the quotes around it.
fn unquoted(text: &str) -> &str {
    let within = |quote| text.strip_prefix(quote)?.strip_suffix(quote);
    within('"').or_else(|| within('\'')).unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(text: &str) -> Vec<String> {
        parse(text).iter().map(|told| told.to_string().trim_end().to_owned()).collect()
    }

    #[test]
    fn options_are_read_as_sshd_reads_them() {
        assert_eq!(texts("# SSHD_OPTS=-p 1\nSSHD_OPTS=\n"), Vec::<String>::new());
        assert_eq!(texts("SSHD_OPTS=-p 22\n"), ["-p 22"]);
        assert_eq!(texts("SSHD_OPTS=\"-p22 -4\"\nOTHER=-p 1\n"), ["-p 22", "-4"]);
        assert_eq!(texts("SSHD_OPTS=-p 1\nSSHD_OPTS='-D4p 22'\n"), ["-4", "-p 22"]);
        // What says nothing of the configuration, and values that look like flags.
        assert_eq!(texts("SSHD_OPTS=-e -q -u0 -E -p\n"), Vec::<String>::new());
        assert_eq!(
            texts("SSHD_OPTS=-oPort=22 -o 'PasswordAuthentication=yes'\n"),
            ["-o Port=22", "-o PasswordAuthentication=yes"]
        );
    }

    #[test]
    fn what_has_a_say_in_where_sshd_listens() {
        let listens = |text: &str| parse(&format!("SSHD_OPTS={text}\n"))[0].listens();
        for text in ["-p 22", "-4", "-6", "-f /etc/other", "-oPort=22", "-o ListenAddress=::"] {
            assert!(listens(text), "{text}");
        }
        assert!(listens("-o addressfamily=inet"));
        assert!(!listens("-o PortOfCall=22"));
        assert!(!listens("-o PasswordAuthentication=yes"));
        assert!(!listens("-h /etc/key"));
    }
}
