//! Who can log in, and how: what must be known before passwords are turned off.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::hardening::settings;
use super::options::NOBODYS;
use crate::host::systemd::Systemd;
use crate::host::{command, files};

/// What is known of the ways in.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Accounts {
    /// The local accounts that have a password or a key, and a shell.
    pub local: Vec<Account>,
    /// What else may know passwords: sources of accounts (nsswitch.conf(5)) and PAM modules.
    pub elsewhere: Vec<String>,
}

/// A local account.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Account {
    /// Its name.
    pub name: String,
    /// Whether it has a password that can be typed.
    pub password: bool,
    /// The file with a key that sshd accepts for it, and that leads to a shell.
    pub key: Option<PathBuf>,
    /// Whether it is root, or can become root.
    pub root: bool,
    /// Why sshd would turn it away although it has a key.
    pub turned_away: Option<String>,
}

impl Accounts {
    /// Why turning off passwords locks nobody out; or why it may.
    ///
    /// Either somebody who can become root has a key, or nobody has a password now.
    pub fn way_in(&self) -> Result<String, String> {
        let leads = |a: &&Account| a.key.is_some() && a.root && a.turned_away.is_none();
        if let Some(account) = self.local.iter().find(leads) {
            return Ok(format!("{} has an authorized key and can become root", account.name));
        }
        let with_password: Vec<&str> =
            self.local.iter().filter(|a| a.password).map(|a| &*a.name).collect();
        if with_password.is_empty() && self.elsewhere.is_empty() {
            return Ok("nobody has a password".to_owned());
        }
        let mut why = vec!["no account that can become root has an authorized key".to_owned()];
        for account in self.local.iter().filter(|a| a.key.is_some()) {
            let reason = account.turned_away.as_deref().unwrap_or("cannot become root");
            why.push(format!("{} has one, and {reason}", account.name));
        }
        if !with_password.is_empty() {
            why.push(format!("these have passwords: {}", with_password.join(", ")));
        }
        if !self.elsewhere.is_empty() {
            why.push(format!("passwords may be known to {}", self.elsewhere.join(", ")));
        }
        Err(why.join("; "))
    }
}

/// Looks who can log in.
pub async fn look(systemd: &Systemd) -> Result<Accounts> {
    let read = |path: &str| fs::read_to_string(path).with_context(|| format!("reading {path}"));
    let (passwd, shadow) = (read("/etc/passwd")?, read("/etc/shadow")?);
    let mut local = Vec::new();
    for entry in entries(&passwd, &shadow) {
        // From nowhere in particular: what is so for some addresses only is no way in.
        let user = settings(systemd, &format!("user={},{NOBODYS}", entry.name)).await?;
        let key = key_of(&entry, user.get("authorizedkeysfile").map_or("", String::as_str))?;
        if key.is_none() && !entry.password {
            continue;
        }
        let root = entry.uid == 0 || (key.is_some() && becomes_root(&entry).await?);
        let turned_away = turned_away(&entry, &user);
        local.push(Account { name: entry.name, password: entry.password, key, root, turned_away });
    }
    let nsswitch = files::read_optional(Path::new("/etc/nsswitch.conf"))?.unwrap_or_default();
    let mut elsewhere = sources(&nsswitch);
    for file in ["/etc/pam.d/sshd", "/etc/pam.d/common-auth"] {
        elsewhere.extend(modules(&files::read_optional(Path::new(file))?.unwrap_or_default()));
    }
    elsewhere.sort();
    elsewhere.dedup();
    Ok(Accounts { local, elsewhere })
}

/// An account of `/etc/passwd` with a shell.
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    name: String,
    uid: u32,
    home: PathBuf,
    password: bool,
    /// Whether the account as such expires: then nothing rests on it.
    expires: bool,
    /// Whether its password is locked.
    locked: bool,
}

/// The accounts that have a shell.
fn entries(passwd: &str, shadow: &str) -> Vec<Entry> {
    let shadow: BTreeMap<&str, Vec<&str>> = shadow
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .map(|fields| (fields[0], fields))
        .collect();
    let mut found = Vec::new();
    for line in passwd.lines() {
        let [name, old, uid, _, _, home, shell] = line.split(':').collect::<Vec<_>>()[..] else {
            continue;
        };
        // An empty field is /bin/sh (passwd(5)).
        let none = ["nologin", "false", "true", "sync", "shutdown", "halt"];
        if none.iter().any(|name| shell.rsplit('/').next() == Some(name)) {
            continue;
        }
        let Ok(uid) = uid.parse() else { continue };
        let fields = shadow.get(name);
        let hash = if old == "x" { fields.and_then(|f| f.get(1)).copied() } else { Some(old) };
        // Nothing that can be typed gives a hash with one of these in it. An empty one is no password
        // at all, which is a way in.
        let hash = hash.unwrap_or("*");
        found.push(Entry {
            name: name.to_owned(),
            uid,
            home: home.into(),
            password: !hash.contains(['!', '*']),
            expires: fields.and_then(|f| f.get(7)).is_some_and(|date| !date.is_empty()),
            locked: hash.starts_with('!'),
        });
    }
    found
}

/// The first of the account's files with keys that has one that is good for a shell.
fn key_of(entry: &Entry, patterns: &str) -> Result<Option<PathBuf>> {
    for pattern in patterns.split_whitespace().filter(|pattern| *pattern != "none") {
        let path = pattern
            .replace("%h", &entry.home.to_string_lossy())
            .replace("%u", &entry.name)
            .replace("%U", &entry.uid.to_string());
        let path = entry.home.join(path);
        // A home that is not there, or on a disk that cannot be read, holds no proof.
        let Ok(bytes) = fs::read(&path) else { continue };
        let keys = String::from_utf8_lossy(&bytes).lines().any(is_key);
        if keys && is_strict(entry, &path)? {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// Whether a line of an `authorized_keys` is a key that leads to a shell, always and from everywhere: no
/// option may stand before it. cloud-init gives root's a command that only says "use another user".
fn is_key(line: &str) -> bool {
    let mut words = line.split_whitespace();
    let kind = words.next().unwrap_or_default();
    let known = ["ssh-ed25519", "ssh-rsa", "sk-ssh-ed25519@openssh.com"].contains(&kind)
        || kind.starts_with("ecdsa-sha2-")
        || kind.starts_with("sk-ecdsa-sha2-");
    known && words.next().is_some_and(|key| key.starts_with("AAAA"))
}

/// Whether `StrictModes` lets sshd use the file: nobody else can write to it, or to what it is in.
fn is_strict(entry: &Entry, path: &Path) -> Result<bool> {
    let path = fs::canonicalize(path).with_context(|| format!("looking at {}", path.display()))?;
    for part in path.ancestors() {
        let doing = || format!("looking at {}", part.display());
        let meta = fs::metadata(part).with_context(doing)?;
        if meta.mode() & 0o022 != 0 || (meta.uid() != 0 && meta.uid() != entry.uid) {
            return Ok(false);
        }
        if part == entry.home {
            break;
        }
    }
    Ok(true)
}

/// Why sshd would not let a key in, by its settings for that user.
fn turned_away(entry: &Entry, user: &BTreeMap<String, String>) -> Option<String> {
    let value = |keyword: &str| user.get(keyword).map_or("", String::as_str);
    if value("pubkeyauthentication") != "yes" {
        return Some("sshd takes no keys".to_owned());
    }
    let methods = value("authenticationmethods");
    if !["", "any"].contains(&methods) && !methods.split(' ').any(|list| list == "publickey") {
        return Some("sshd asks for more than a key".to_owned());
    }
    if entry.uid == 0 && ["no", "forced-commands-only"].contains(&value("permitrootlogin")) {
        return Some("sshd does not let root in".to_owned());
    }
    // Groups and patterns are not followed: nothing rests on what they allow.
    if ["denyusers", "denygroups", "allowgroups"].iter().any(|keyword| !value(keyword).is_empty()) {
        return Some("sshd lets in by group or pattern".to_owned());
    }
    let allowed = value("allowusers");
    if !allowed.is_empty() && !allowed.split(' ').any(|name| name == entry.name) {
        return Some("is not among sshd's AllowUsers".to_owned());
    }
    if entry.expires {
        return Some("the account expires".to_owned());
    }
    if entry.locked && value("usepam") != "yes" {
        return Some("the account is locked".to_owned());
    }
    None
}

/// Whether sudo(8) makes an account root: without a password, or with the one that it has.
async fn becomes_root(entry: &Entry) -> Result<bool> {
    if !Path::new(command::SUDO).exists() {
        return Ok(false);
    }
    let args = ["-n", "-l", "-U", &entry.name];
    let output = command::run(command::SUDO, &args, Duration::from_secs(20)).await?;
    Ok(output.code == Some(0) && gives_root(&output.stdout, entry.password))
}

/// Reads what `sudo -l` lists. Of the rules that match a command the last counts (sudoers(5)).
fn gives_root(listed: &str, password: bool) -> bool {
    let mut rules = listed.lines().filter_map(|line| {
        let (who, what) = line.trim().strip_prefix('(')?.split_once(')')?;
        let who = who.split(':').next().unwrap_or_default().trim();
        let what: Vec<&str> = what.split([' ', ',']).filter(|word| !word.is_empty()).collect();
        let all = ["ALL", "root"].contains(&who) && what.last() == Some(&"ALL");
        all.then(|| what.contains(&"NOPASSWD:"))
    });
    rules.next_back().is_some_and(|nothing_asked| nothing_asked || password)
}

/// The sources of accounts that are not files of this machine.
fn sources(nsswitch: &str) -> Vec<String> {
    let local = ["files", "compat", "systemd"];
    let mut found = BTreeSet::new();
    for line in nsswitch.lines() {
        let line = line.split('#').next().unwrap_or_default();
        let Some((database, list)) = line.split_once(':') else { continue };
        if ["passwd", "shadow"].contains(&database.trim()) {
            let list = list.split_whitespace().filter(|word| !word.starts_with('['));
            found.extend(list.filter(|word| !local.contains(word)).map(str::to_owned));
        }
    }
    found.into_iter().collect()
}

/// The PAM modules that may know a password and are not those of a plain Debian or Ubuntu.
fn modules(pam: &str) -> Vec<String> {
    let plain = ["unix", "deny", "permit", "cap", "env", "nologin", "faillock", "faildelay"];
    let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let mut found = Vec::new();
    for line in pam.lines().map(words) {
        if line.first().is_some_and(|kind| kind.trim_start_matches('-') == "auth") {
            let module = line.iter().find_map(|word| {
                word.rsplit('/').next()?.strip_prefix("pam_")?.strip_suffix(".so")
            });
            found.extend(module.filter(|name| !plain.contains(name)).map(|m| format!("pam_{m}")));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(name: &str, password: bool, key: bool, root: bool) -> Account {
        let key = key.then(|| PathBuf::from("k"));
        Account { name: name.into(), password, key, root, turned_away: None }
    }

    #[test]
    fn passwords_are_given_up_only_for_a_key_that_leads_to_root() {
        let with = |local: &[Account], elsewhere: &[&str]| {
            let elsewhere = elsewhere.iter().map(|&name| name.to_owned()).collect();
            Accounts { local: local.to_vec(), elsewhere }.way_in()
        };
        assert!(with(&[account("admin", false, true, true)], &[]).is_ok());
        assert!(with(&[account("admin", true, true, true)], &["sss"]).is_ok());
        assert!(with(&[], &[]).is_ok());
        let no = with(&[account("admin", true, false, true)], &[]).unwrap_err();
        assert!(no.contains("these have passwords: admin"), "{no}");
        let no = with(&[account("admin", true, true, false)], &[]).unwrap_err();
        assert!(no.contains("admin has one, and cannot become root"), "{no}");
        assert!(with(&[], &["sss"]).unwrap_err().contains("may be known to sss"));
        let mut away = account("root", true, true, true);
        away.turned_away = Some("sshd does not let root in".into());
        assert!(with(&[away], &[]).unwrap_err().contains("sshd does not let root in"));
    }

    #[test]
    fn only_a_key_without_options_counts() {
        assert!(is_key("ssh-ed25519 AAAAC3Nz x@y"));
        assert!(is_key("ecdsa-sha2-nistp256 AAAAE2Vj"));
        let cloud_init =
            "no-port-forwarding,command=\"echo 'Please login as admin'\" ssh-rsa AAAAB3 k";
        for line in ["", "# ssh-rsa AAAA", "ssh-dss AAAAB3 k", "ssh-rsa", "ssh-rsa x", cloud_init] {
            assert!(!is_key(line), "{line}");
        }
    }

    #[test]
    fn accounts_are_read() {
        let passwd = "root:x:0:0:root:/root:/bin/bash\ndaemon:x:1:1::/:/usr/sbin/nologin\n\
                      admin:x:1000:1000::/home/admin:/bin/bash\nold:hash:7:7::/o:\nx:x:8:8::/x:/bin/sh\n";
        let shadow = "root:*:1:0:99999:7:::\nadmin:$y$abc:1:0:99999:7::20000:\nx:!$y$abc:1:::::\n";
        let seen = entries(passwd, shadow);
        let text = |e: &Entry| (e.name.clone(), e.password, e.expires, e.locked);
        let expected = [
            ("root".to_owned(), false, false, false),
            ("admin".to_owned(), true, true, false),
            ("old".to_owned(), true, false, false),
            ("x".to_owned(), false, false, true),
        ];
        assert_eq!(seen.iter().map(text).collect::<Vec<_>>(), expected);
        // No password at all is one that anybody knows.
        assert!(entries("a::1:1::/:/bin/sh", "")[0].password);
    }

    #[test]
    fn sudo_counts_if_it_asks_for_nothing_that_is_not_there() {
        let list =
            |rule: &str| format!("User admin may run the following commands on x:\n    {rule}\n");
        for rule in ["(ALL) NOPASSWD: ALL", "(ALL : ALL) NOPASSWD: ALL", "(root) NOPASSWD: ALL"] {
            assert!(gives_root(&list(rule), false), "{rule}");
        }
        assert!(gives_root(&list("(ALL : ALL) ALL"), true));
        assert!(!gives_root(&list("(ALL : ALL) ALL"), false));
        assert!(!gives_root(&list("(www-data) NOPASSWD: ALL"), true));
        assert!(!gives_root(&list("(ALL) NOPASSWD: /usr/bin/apt"), true));
        let both = list("(ALL) NOPASSWD: ALL\n    (ALL : ALL) ALL");
        assert!(gives_root(&both, true) && !gives_root(&both, false), "the last counts");
        assert!(gives_root(&list("(ALL : ALL) ALL\n    (ALL) NOPASSWD: ALL"), false));
        assert!(!gives_root("User admin is not allowed to run sudo on x.", true));
    }

    #[test]
    fn passwords_that_are_known_elsewhere_are_seen() {
        let plain = "passwd:         files systemd\nshadow: files [NOTFOUND=return]\nhosts: dns\n";
        assert!(sources(plain).is_empty());
        assert_eq!(sources("passwd: files sss # x\nshadow: files ldap"), ["ldap", "sss"]);
        let debian = "auth\t[success=1 default=ignore]\tpam_unix.so nullok\nauth requisite pam_deny.so\n\
                      account required pam_krb5.so\n@include common-auth\n";
        assert!(modules(debian).is_empty());
        assert_eq!(
            modules("auth sufficient pam_sss.so\n-auth optional /lib/pam_x.so"),
            ["pam_sss", "pam_x"]
        );
    }

    #[test]
    fn who_is_turned_away_is_no_way_in() {
        let entry = |uid| Entry {
            name: "admin".into(),
            uid,
            home: "/home/admin".into(),
            password: false,
            expires: false,
            locked: true,
        };
        let with = |uid, changes: &[(&str, &str)]| {
            let plain =
                [("pubkeyauthentication", "yes"), ("usepam", "yes"), ("permitrootlogin", "yes")];
            let user = plain.iter().chain(changes).map(|(k, v)| ((*k).into(), (*v).into()));
            turned_away(&entry(uid), &user.collect()).is_none()
        };
        assert!(with(1000, &[]) && with(0, &[]));
        assert!(with(1000, &[("authenticationmethods", "any")]));
        assert!(with(1000, &[("allowusers", "x admin")]));
        assert!(!with(1000, &[("pubkeyauthentication", "no")]));
        assert!(!with(1000, &[("authenticationmethods", "publickey,password")]));
        assert!(!with(1000, &[("allowusers", "x")]));
        assert!(!with(1000, &[("denygroups", "x")]));
        assert!(!with(1000, &[("usepam", "no")]));
        assert!(!with(0, &[("permitrootlogin", "no")]) && with(1000, &[("permitrootlogin", "no")]));
    }
}
