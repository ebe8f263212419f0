//! `sshd-hardening`: nobody logs in with a password, and no weak algorithm is offered.
//!
//! What is asked for follows the CIS benchmarks for Debian and Ubuntu (section "Configure SSH Server")
//! and Mozilla's OpenSSH guidelines, where these agree with a host that must not lock its operator out:
//! root may log in with a key, where CIS asks for `PermitRootLogin no`, and sshd's own defaults are kept
//! but for the weak algorithms among them, where Mozilla has a list of its own that ages.
//!
//! It is judged by `sshd -T`, the values in effect. What stands behind `Match` replaces them for some
//! connections, so each such line must be right by itself: which connections it would be is not asked.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::config::{Config, Hardening};
use crate::control::{About, Context, Control, Fact, Plan, Unknown, Verdict};
use crate::host::sshd;
use crate::host::sshd::accounts::{self, Accounts};
use crate::host::sshd::hardening::{self, DROP_IN, Setting};
use crate::host::sshd::lines::{self, Line};
use crate::host::sshd::options::{self, Told};
use crate::step::Step;

/// See the module.
pub struct SshdHardening;

/// What is observed; nothing of it where the control is off.
#[derive(Debug, Default, Serialize)]
pub struct Facts {
    /// The values in effect, of the keywords that are judged.
    pub settings: Option<Fact<BTreeMap<String, String>>>,
    /// The lines that set one of them, in all files but ours.
    pub lines: Option<Fact<Vec<Line>>>,
    /// What our file says.
    pub ours: Option<Fact<Vec<Setting>>>,
    /// What sshd is told on the command line of its next start.
    pub options: Option<Fact<Vec<Told>>>,
    /// What the sshd that runs was told, where that is something else.
    pub running: Option<Fact<Option<Vec<Told>>>>,
    /// Who can log in; looked at only where passwords are to be turned off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accounts: Option<Fact<Accounts>>,
}

/// One thing that is asked for.
struct Rule {
    /// The keyword.
    keyword: &'static str,
    /// Whether a value is right, as `sshd -T` says it.
    fits: fn(&str) -> bool,
    /// What is written where it is not.
    set: &'static str,
    /// Whether somebody who logs in with a password cannot do so any more.
    passwords: bool,
}

const fn rule(keyword: &'static str, fits: fn(&str) -> bool, set: &'static str) -> Rule {
    Rule { keyword, fits, set, passwords: false }
}

const fn password(keyword: &'static str, fits: fn(&str) -> bool, set: &'static str) -> Rule {
    Rule { keyword, fits, set, passwords: true }
}

/// What is asked for. The lists of algorithms lose what [`weak`] names, by patterns: a list of what is
/// left would keep a later sshd, which may not know them all, from starting.
const RULES: [Rule; 15] = [
    password("PermitRootLogin", |v| ROOT.contains(&v), "prohibit-password"),
    password("PasswordAuthentication", is_no, "no"),
    // With PAM, this is where passwords are asked for too.
    password("KbdInteractiveAuthentication", is_no, "no"),
    rule("PermitEmptyPasswords", is_no, "no"),
    rule("X11Forwarding", is_no, "no"),
    rule("AllowAgentForwarding", is_no, "no"),
    rule("MaxAuthTries", |v| within(v, 4), "4"),
    rule("ClientAliveInterval", |v| within(v, 300), "300"),
    rule("ClientAliveCountMax", |v| within(v, 3), "3"),
    rule("Ciphers", none_weak, "-*-cbc,3des*,arcfour*"),
    rule("MACs", none_weak, "-*md5*,*sha1*,*ripemd*,umac-64*,*-96*"),
    rule("KexAlgorithms", none_weak, "-*sha1*"),
    rule("HostKeyAlgorithms", none_weak, "-ssh-rsa,ssh-rsa-cert-v01@openssh.com,ssh-dss*"),
    rule("PubkeyAcceptedAlgorithms", none_weak, "-ssh-rsa,ssh-rsa-cert-v01@openssh.com,ssh-dss*"),
    rule("CASignatureAlgorithms", none_weak, "-ssh-rsa,ssh-dss*"),
];

/// Where root does not log in with a password.
const ROOT: [&str; 4] = ["no", "prohibit-password", "without-password", "forced-commands-only"];

/// The lists of algorithms: setting one of them again takes back what somebody else set.
const LISTS: [&str; 6] = [
    "ciphers",
    "macs",
    "kexalgorithms",
    "hostkeyalgorithms",
    "pubkeyacceptedalgorithms",
    "casignaturealgorithms",
];

/// Says which ways of logging in must be combined.
const METHODS: &str = "authenticationmethods";

/// Other names of keywords (sshd_config(5), and servconf.c for those that are not in it any more).
const ALIASES: [(&str, &str); 3] = [
    ("challengeresponseauthentication", "kbdinteractiveauthentication"),
    ("skeyauthentication", "kbdinteractiveauthentication"),
    ("pubkeyacceptedkeytypes", "pubkeyacceptedalgorithms"),
];

fn is_no(value: &str) -> bool {
    value == "no"
}

fn within(value: &str, most: u32) -> bool {
    value.parse().is_ok_and(|value: u32| (1..=most).contains(&value))
}

fn none_weak(list: &str) -> bool {
    // In a file, a list may be what the defaults lose, or what they get.
    list.starts_with('-') || !list.trim_start_matches(['+', '^']).split(',').any(weak)
}

/// Whether an algorithm is known to be weak: broken or short hashes, modes and ciphers that leak, the
/// signatures over SHA-1 that OpenSSH 8.8 turned off.
fn weak(name: &str) -> bool {
    ["md5", "sha1", "ripemd", "-cbc", "3des", "arcfour", "-96"].iter().any(|w| name.contains(w))
        || ["umac-64", "ssh-dss", "none"].iter().any(|w| name.starts_with(w))
        || ["ssh-rsa", "ssh-rsa*", "ssh-rsa-cert-v01@openssh.com"].contains(&name)
}

impl Control for SshdHardening {
    type Facts = Facts;

    const ABOUT: About = About {
        id: "sshd-hardening",
        title: "sshd takes keys only, and no weak algorithm",
        why: "A password can be guessed, and is on every port. What a weak algorithm protects can be \
              read or changed on its way.",
        requires: &[],
        // One change of sshd at a time.
        acts_after: &["sshd-port"],
    };

    async fn observe(&self, cx: &Context) -> Facts {
        let mut facts = Facts::default();
        if cx.config.sshd.hardening == Hardening::Off {
            return facts;
        }
        if let Ok(systemd) = cx.host.systemd().await
            && let Ok(socket) = systemd.unit(sshd::SOCKET).await
        {
            sshd::wake(&socket).await;
        }
        let known = |name: &str| rule_of(name).is_some() || name == METHODS;
        let settings =
            async { hardening::settings(cx.host.systemd().await?, options::NOBODYS).await };
        let settings = settings.await.map(|mut settings| {
            settings.retain(|name, _| known(name));
            settings
        });
        let mut keywords: Vec<String> =
            RULES.iter().map(|rule| rule.keyword.to_ascii_lowercase()).collect();
        keywords.extend(ALIASES.iter().map(|(other, _)| (*other).to_owned()));
        keywords.push(METHODS.to_owned());
        let keywords: Vec<&str> = keywords.iter().map(String::as_str).collect();
        facts.settings = Some(Fact::new("sshd -T", settings));
        facts.lines = Some(Fact::new("sshd_config", lines::elsewhere(DROP_IN, &keywords)));
        facts.ours = Some(Fact::new(DROP_IN, hardening::ours()));
        let options = async { options::at_start(cx.host.systemd().await?).await };
        facts.options = Some(Fact::new("the command line in ssh.service", options.await));
        let running = async { options::running(cx.host.systemd().await?).await };
        facts.running = Some(Fact::new("the command line of sshd", running.await));
        if let Ok(wrong) = wrong(&facts)
            && cx.config.sshd.hardening == Hardening::Enforce
            && wrong.iter().any(|wrong| wrong.rule.passwords)
        {
            let source = "/etc/passwd, /etc/shadow, authorized_keys, sudo -l";
            let accounts = async { accounts::look(cx.host.systemd().await?).await };
            facts.accounts = Some(Fact::new(source, accounts.await));
        }
        facts
    }

    fn judge(&self, config: &Config, facts: &Facts) -> Result<Verdict, Unknown> {
        if config.sshd.hardening == Hardening::Off {
            return Ok(Verdict::NotApplicable { why: "sshd.hardening is \"off\"".to_owned() });
        }
        let mut seen: Vec<String> = wrong(facts)?.into_iter().map(|wrong| wrong.seen).collect();
        seen.extend(command_line(facts)?);
        if seen.is_empty() {
            return Ok(Verdict::pass("sshd takes keys only, and offers no weak algorithm"));
        }
        let seen = seen.join("; ");
        Ok(match config.sshd.hardening {
            Hardening::Report => Verdict::pass(format!("WARNING: {seen}")),
            _ => Verdict::fail(
                "keys only, and no weak algorithm",
                seen,
                "run `hostagent provision`; what it refuses, change in the files that it names, or \
                 set sshd.hardening to \"report\"",
            ),
        })
    }

    fn plan(&self, config: &Config, facts: &Facts) -> Result<Plan, Unknown> {
        if config.sshd.hardening != Hardening::Enforce {
            return Ok(Plan::Nothing);
        }
        let (mut wanted, mut refused) = (ours(facts)?.clone(), command_line(facts)?);
        let mut passwords = false;
        let mut changed = false;
        let lines = lines_of(facts)?;
        for wrong in wrong(facts)? {
            let name = wrong.rule.keyword.to_ascii_lowercase();
            let set_by = |l: &&Line| !l.conditional && canonical(&l.keyword) == name;
            if wrong.conditional {
                refused.push(format!("behind Match, {}: change it there", wrong.seen));
            } else if set_there(wrong.rule, facts)? {
                let keyword = wrong.rule.keyword;
                refused
                    .push(format!("{keyword} is set on sshd's command line: {}", options::WHERE));
            } else if wanted.iter().any(|setting| setting.keyword == wrong.rule.keyword) {
                refused.push(format!(
                    "{} is set by something that sshd reads before {DROP_IN}: remove it there",
                    wrong.rule.keyword
                ));
            } else if let Some(line) = lines.iter().find(set_by)
                && LISTS.contains(&name.as_str())
            {
                // Ours would take back what else the operator left out.
                refused.push(format!(
                    "{}, line {}, sets {}: remove the weak ones there",
                    line.file.display(),
                    line.number,
                    wrong.rule.keyword
                ));
            } else {
                if wrong.rule.passwords {
                    if running(facts)?.is_some() {
                        // What says so is refused already; whom that lets in is not known.
                        continue;
                    }
                    let Some(accounts) = &facts.accounts else {
                        return Err(Unknown("who can log in was not looked at".to_owned()));
                    };
                    if let Err(why) = accounts.known()?.way_in() {
                        refused.push(format!("{} stays as it is: {why}", wrong.rule.keyword));
                        continue;
                    }
                    passwords = true;
                }
                changed = true;
                let (keyword, value) = (wrong.rule.keyword.to_owned(), wrong.rule.set.to_owned());
                wanted.push(Setting { keyword, value });
            }
        }
        let steps = if changed { vec![Step::HardenSshd { wanted, passwords }] } else { vec![] };
        Ok(Plan::with_refusals(steps, &refused))
    }
}

/// Something that is not as it is asked for.
struct Wrong {
    rule: &'static Rule,
    /// What was seen.
    seen: String,
    /// Whether it is so behind a `Match` only.
    conditional: bool,
}

fn not_looked_at() -> Unknown {
    Unknown("sshd's configuration was not looked at".to_owned())
}

fn lines_of(facts: &Facts) -> Result<&Vec<Line>, Unknown> {
    facts.lines.as_ref().ok_or_else(not_looked_at)?.known()
}

fn ours(facts: &Facts) -> Result<&Vec<Setting>, Unknown> {
    facts.ours.as_ref().ok_or_else(not_looked_at)?.known()
}

/// What is wrong with the command line: what it sets is in effect, and judged, like the rest.
fn command_line(facts: &Facts) -> Result<Vec<String>, Unknown> {
    let mut wrong = Vec::new();
    if let Some(file) =
        options::other_file(facts.options.as_ref().ok_or_else(not_looked_at)?.known()?)
    {
        wrong.push(format!(
            "sshd is told to read {file} instead of {}: take `-f {file}` out of {}",
            lines::MAIN,
            options::WHERE
        ));
    }
    wrong.extend(running(facts)?.map(|told| options::runs_otherwise(told)));
    Ok(wrong)
}

/// What the sshd that runs was told, where that is something else than at its next start.
fn running(facts: &Facts) -> Result<Option<&Vec<Told>>, Unknown> {
    Ok(facts.running.as_ref().ok_or_else(not_looked_at)?.known()?.as_ref())
}

/// The keyword of a rule, where the command line sets it: no file of ours outdoes that.
fn set_there(rule: &Rule, facts: &Facts) -> Result<bool, Unknown> {
    let told = facts.options.as_ref().ok_or_else(not_looked_at)?.known()?;
    let keyword = rule.keyword.to_ascii_lowercase();
    Ok(told.iter().filter_map(Told::keyword).any(|set| canonical(&set) == keyword))
}

/// A keyword's own name, in lower case.
fn canonical(keyword: &str) -> &str {
    ALIASES.iter().find(|(other, _)| *other == keyword).map_or(keyword, |(_, name)| name)
}

fn rule_of(keyword: &str) -> Option<&'static Rule> {
    RULES.iter().find(|rule| rule.keyword.eq_ignore_ascii_case(canonical(keyword)))
}

/// All that is not as it is asked for.
fn wrong(facts: &Facts) -> Result<Vec<Wrong>, Unknown> {
    let settings = facts.settings.as_ref().ok_or_else(not_looked_at)?.known()?;
    let lines = lines_of(facts)?;
    // A password beside a key is a second factor, as long as that is so for everybody.
    let second_factor = settings.get(METHODS).is_some_and(|methods| asks_for_a_key(methods))
        && !lines.iter().any(|line| line.conditional && line.keyword == METHODS);
    let also = |rule: &Rule| {
        second_factor
            && ["PasswordAuthentication", "KbdInteractiveAuthentication"].contains(&rule.keyword)
    };
    let mut found = Vec::new();
    for rule in &RULES {
        let name = rule.keyword.to_ascii_lowercase();
        let Some(value) = settings.get(&name) else {
            return Err(Unknown(format!("`sshd -T` does not say what {} is", rule.keyword)));
        };
        if !(rule.fits)(value) && !also(rule) {
            let seen = format!("{} is {}", rule.keyword, shown(value));
            found.push(Wrong { rule, seen, conditional: false });
        }
    }
    for line in lines.iter().filter(|line| line.conditional) {
        let Some(rule) = rule_of(&line.keyword) else { continue };
        let value = line.value.join(" ");
        let lower = value.to_ascii_lowercase();
        if !(rule.fits)(&lower) && !also(rule) {
            let (file, number) = (line.file.display(), line.number);
            let seen = format!("{} is {} in {file}, line {number}", rule.keyword, shown(&value));
            found.push(Wrong { rule, seen, conditional: true });
        }
    }
    Ok(found)
}

/// Whether every way that is allowed has a key in it.
fn asks_for_a_key(methods: &str) -> bool {
    let mut ways = methods.split_whitespace().peekable();
    ways.peek().is_some() && ways.all(|way| way.split(',').any(|method| method == "publickey"))
}

/// A value for people: of a list of algorithms the weak ones.
fn shown(value: &str) -> String {
    let weak: Vec<&str> = value.split(',').filter(|name| weak(name)).collect();
    if value.contains(',') && !weak.is_empty() { weak.join(",") } else { value.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::sshd::accounts::Account;
    use anyhow::anyhow;
    use std::path::PathBuf;

    fn known<T>(value: T) -> Fact<T> {
        Fact::new("t", Ok(value))
    }

    fn unknown<T>() -> Fact<T> {
        Fact::new("t", Err(anyhow!("x")))
    }

    const GOOD: [(&str, &str); 16] = [
        ("permitrootlogin", "without-password"),
        ("passwordauthentication", "no"),
        ("kbdinteractiveauthentication", "no"),
        ("permitemptypasswords", "no"),
        ("x11forwarding", "no"),
        ("allowagentforwarding", "no"),
        ("maxauthtries", "4"),
        ("clientaliveinterval", "300"),
        ("clientalivecountmax", "3"),
        ("ciphers", "chacha20-poly1305@openssh.com,aes256-gcm@openssh.com,aes128-ctr"),
        ("macs", "umac-128-etm@openssh.com,hmac-sha2-256-etm@openssh.com,hmac-sha2-512"),
        ("kexalgorithms", "mlkem768x25519-sha256,diffie-hellman-group14-sha256"),
        ("hostkeyalgorithms", "ssh-ed25519,rsa-sha2-512,rsa-sha2-256"),
        ("pubkeyacceptedalgorithms", "ssh-ed25519,rsa-sha2-512"),
        ("casignaturealgorithms", "ssh-ed25519,rsa-sha2-512"),
        ("authenticationmethods", "any"),
    ];

    fn facts(changes: &[(&str, &str)], lines: Vec<Line>) -> Facts {
        let settings = GOOD.iter().chain(changes).map(|(k, v)| ((*k).into(), (*v).into()));
        Facts {
            settings: Some(known(settings.collect())),
            lines: Some(known(lines)),
            ours: Some(known(vec![])),
            options: Some(known(vec![])),
            running: Some(known(None)),
            accounts: Some(known(Accounts::default())),
        }
    }

    fn behind_match(keyword: &str, value: &str) -> Line {
        Line {
            file: PathBuf::from("/etc/ssh/sshd_config"),
            number: 7,
            text: String::new(),
            keyword: keyword.into(),
            value: value.split(' ').map(str::to_owned).collect(),
            conditional: true,
        }
    }

    fn with_mode(mode: Hardening) -> Config {
        let mut config = Config::default();
        config.sshd.hardening = mode;
        config
    }

    fn outcome(facts: &Facts) -> (&'static str, String) {
        let config = with_mode(Hardening::Enforce);
        let word = SshdHardening.judge(&config, facts).map_or("unknown", |v| v.word());
        let set = |steps: &[Step]| match steps {
            [Step::HardenSshd { wanted, .. }] => wanted
                .iter()
                .map(|w| format!("{} {}", w.keyword, w.value))
                .collect::<Vec<_>>()
                .join("; "),
            _ => panic!("{steps:?}"),
        };
        let plan = match SshdHardening.plan(&config, facts) {
            Ok(Plan::Nothing) => String::new(),
            Ok(Plan::Steps(steps)) => set(&steps),
            Ok(Plan::Contain { steps, .. }) => format!("{} and refuse", set(&steps)),
            Ok(Plan::Refuse { .. }) | Err(_) => "refuse".to_owned(),
        };
        (word, plan)
    }

    #[test]
    fn each_keyword_is_judged_and_set() {
        assert_eq!(outcome(&facts(&[], vec![])), ("pass", String::new()));
        let table = [
            ("permitrootlogin", "yes", "PermitRootLogin prohibit-password"),
            ("passwordauthentication", "yes", "PasswordAuthentication no"),
            ("kbdinteractiveauthentication", "yes", "KbdInteractiveAuthentication no"),
            ("permitemptypasswords", "yes", "PermitEmptyPasswords no"),
            ("x11forwarding", "yes", "X11Forwarding no"),
            ("allowagentforwarding", "yes", "AllowAgentForwarding no"),
            ("maxauthtries", "6", "MaxAuthTries 4"),
            ("clientaliveinterval", "0", "ClientAliveInterval 300"),
            ("clientaliveinterval", "301", "ClientAliveInterval 300"),
            ("clientalivecountmax", "0", "ClientAliveCountMax 3"),
            ("ciphers", "aes128-ctr,aes128-cbc", "Ciphers -*-cbc,3des*,arcfour*"),
            ("macs", "umac-64-etm@openssh.com", "MACs -*md5*,*sha1*,*ripemd*,umac-64*,*-96*"),
            ("macs", "hmac-sha1-etm@openssh.com", "MACs -*md5*,*sha1*,*ripemd*,umac-64*,*-96*"),
            ("kexalgorithms", "diffie-hellman-group14-sha1", "KexAlgorithms -*sha1*"),
            (
                "hostkeyalgorithms",
                "ssh-ed25519,ssh-rsa",
                "HostKeyAlgorithms -ssh-rsa,ssh-rsa-cert-v01@openssh.com,ssh-dss*",
            ),
        ];
        for (keyword, value, set) in table {
            let seen = outcome(&facts(&[(keyword, value)], vec![]));
            assert_eq!(seen, ("fail", set.to_owned()), "{keyword} {value}");
        }
        for value in ["no", "prohibit-password", "forced-commands-only"] {
            assert_eq!(outcome(&facts(&[("permitrootlogin", value)], vec![])).0, "pass", "{value}");
        }
    }

    #[test]
    fn passwords_go_only_when_that_locks_nobody_out() {
        let mut locked = facts(&[("passwordauthentication", "yes"), ("maxauthtries", "6")], vec![]);
        let admin =
            Account { name: "admin".into(), password: true, root: true, ..Account::default() };
        locked.accounts = Some(known(Accounts { local: vec![admin.clone()], elsewhere: vec![] }));
        assert_eq!(outcome(&locked), ("fail", "MaxAuthTries 4 and refuse".to_owned()));
        let with_key = Account { key: Some("k".into()), ..admin };
        locked.accounts = Some(known(Accounts { local: vec![with_key], elsewhere: vec![] }));
        let both = "PasswordAuthentication no; MaxAuthTries 4";
        assert_eq!(outcome(&locked), ("fail", both.to_owned()));
        for hidden in [None, Some(unknown())] {
            locked.accounts = hidden;
            assert_eq!(outcome(&locked), ("fail", "refuse".to_owned()));
        }
    }

    #[test]
    fn a_password_beside_a_key_is_a_second_factor() {
        let with = |methods: &str, lines| {
            let changes =
                [("kbdinteractiveauthentication", "yes"), ("authenticationmethods", methods)];
            outcome(&facts(&changes, lines)).0
        };
        assert_eq!(with("publickey,keyboard-interactive", vec![]), "pass");
        assert_eq!(with("publickey,keyboard-interactive publickey", vec![]), "pass");
        assert_eq!(with("publickey,keyboard-interactive password", vec![]), "fail");
        assert_eq!(with("any", vec![]), "fail");
        let some = behind_match("authenticationmethods", "password");
        assert_eq!(with("publickey,keyboard-interactive", vec![some]), "fail");
    }

    #[test]
    fn what_stands_behind_match_is_not_missed() {
        let table = [
            ("passwordauthentication", "yes", "fail"),
            ("passwordauthentication", "no", "pass"),
            ("challengeresponseauthentication", "yes", "fail"),
            ("permitrootlogin", "YES", "fail"),
            ("permitrootlogin", "prohibit-password", "pass"),
            ("x11forwarding", "yes", "fail"),
            ("pubkeyacceptedkeytypes", "+ssh-rsa", "fail"),
            ("pubkeyacceptedalgorithms", "-ssh-rsa", "pass"),
            ("maxauthtries", "10", "fail"),
        ];
        for (keyword, value, word) in table {
            let seen = outcome(&facts(&[], vec![behind_match(keyword, value)]));
            let plan = if word == "pass" { "" } else { "refuse" };
            assert_eq!(seen, (word, plan.to_owned()), "{keyword} {value}");
        }
    }

    #[test]
    fn what_the_operator_set_is_not_taken_back() {
        let line = Line { conditional: false, ..behind_match("macs", "hmac-sha1") };
        let seen = outcome(&facts(&[("macs", "hmac-sha1")], vec![line]));
        assert_eq!(seen, ("fail", "refuse".to_owned()));
        // Something is read before ours.
        let mut first = facts(&[("maxauthtries", "6")], vec![]);
        let ours = Setting { keyword: "MaxAuthTries".into(), value: "4".into() };
        first.ours = Some(known(vec![ours]));
        assert_eq!(outcome(&first), ("fail", "refuse".to_owned()));
        // What ours has is kept.
        first = Facts { ours: first.ours, ..facts(&[("x11forwarding", "yes")], vec![]) };
        assert_eq!(outcome(&first), ("fail", "MaxAuthTries 4; X11Forwarding no".to_owned()));
    }

    #[test]
    fn what_cannot_be_seen_never_passes() {
        let hide: [fn(&mut Facts); 8] = [
            |f| f.settings = Some(unknown()),
            |f| f.settings = None,
            |f| f.lines = Some(unknown()),
            |f| f.lines = None,
            |f| f.options = Some(unknown()),
            |f| f.options = None,
            |f| f.running = Some(unknown()),
            |f| f.running = None,
        ];
        for (i, hide) in hide.into_iter().enumerate() {
            let mut facts = facts(&[], vec![]);
            hide(&mut facts);
            assert_eq!(outcome(&facts), ("unknown", "refuse".to_owned()), "case {i}");
            let report = SshdHardening.judge(&with_mode(Hardening::Report), &facts);
            assert!(report.is_err(), "case {i}");
        }
        for (keyword, _) in &GOOD[..15] {
            let mut facts = facts(&[], vec![]);
            let mut settings = facts.settings.unwrap().known().unwrap().clone();
            settings.remove(*keyword);
            facts.settings = Some(known(settings));
            assert_eq!(outcome(&facts).0, "unknown", "{keyword}");
        }
        let mut ours = facts(&[("x11forwarding", "yes")], vec![]);
        ours.ours = Some(unknown());
        assert_eq!(outcome(&ours), ("fail", "refuse".to_owned()));
    }

    #[test]
    fn the_command_line_is_not_ours_to_change() {
        let told = |flag, value: &str| Told { flag, value: value.into() };
        let with = |options, running| Facts {
            options: Some(known(options)),
            running: Some(known(running)),
            ..facts(&[], vec![])
        };
        // What it sets is in `sshd -T`; another file, and what was before, are not.
        let yes = || told('o', "PasswordAuthentication=yes");
        assert_eq!(outcome(&with(vec![yes()], None)).0, "pass");
        let refused = ("fail", "refuse".to_owned());
        assert_eq!(outcome(&with(vec![told('f', "/etc/other")], None)), refused);
        assert_eq!(outcome(&with(vec![], Some(vec![yes()]))), refused);
        assert_eq!(outcome(&with(vec![yes()], Some(vec![]))), refused);
        // Ours would not take effect, and passwords do not go while something else runs.
        let wrong = |options, running| Facts {
            options: Some(known(options)),
            running: Some(known(running)),
            ..facts(&[("passwordauthentication", "yes"), ("maxauthtries", "6")], vec![])
        };
        let kept = ("fail", "MaxAuthTries 4 and refuse".to_owned());
        assert_eq!(outcome(&wrong(vec![yes()], None)), kept);
        let alias = told('o', "skeyauthentication yes");
        assert_eq!(outcome(&wrong(vec![alias.clone(), yes()], None)), kept);
        let key = told('o', "PubkeyAuthentication=no");
        let mut running = wrong(vec![], Some(vec![key]));
        let admin = Account { name: "admin".into(), root: true, ..Account::default() };
        let admin = Account { key: Some("k".into()), ..admin };
        running.accounts = Some(known(Accounts { local: vec![admin], ..Accounts::default() }));
        assert_eq!(outcome(&running), kept);
    }

    #[test]
    fn report_says_it_and_changes_nothing() {
        let facts = facts(&[("x11forwarding", "yes")], vec![]);
        let report = with_mode(Hardening::Report);
        let verdict = SshdHardening.judge(&report, &facts).unwrap();
        assert_eq!(verdict, Verdict::pass("WARNING: X11Forwarding is yes"));
        assert_eq!(SshdHardening.plan(&report, &facts), Ok(Plan::Nothing));
        let off = with_mode(Hardening::Off);
        assert_eq!(SshdHardening.judge(&off, &facts).unwrap().word(), "not-applicable");
        assert_eq!(SshdHardening.plan(&off, &facts), Ok(Plan::Nothing));
    }
}
