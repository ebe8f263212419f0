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
    let admin = Account { name: "admin".into(), password: true, root: true, ..Account::default() };
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
        let changes = [("kbdinteractiveauthentication", "yes"), ("authenticationmethods", methods)];
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
