use super::*;
use anyhow::anyhow;
use jiff::Timestamp;
use serde_json::{Value, json};

fn known<T>(value: T) -> Fact<T> {
    Fact::new("t", Ok(value))
}

fn unknown<T>() -> Fact<T> {
    Fact::new("t", Err(anyhow!("x")))
}

type Break = fn(&mut Daemon);

const STARTED: i64 = 1000;

fn unit(active: &str) -> Unit {
    Unit {
        load_state: "loaded".into(),
        active_state: active.into(),
        main_pid: u32::from(active == "active") * 7,
        main_started: Some(Timestamp::from_second(STARTED).unwrap()),
        ..Unit::default()
    }
}

/// Docker with this file, which it has read.
fn daemon(file: &Value) -> Daemon {
    let settings = file.as_object().unwrap().clone().into_iter().collect();
    let security = ["name=apparmor", "name=seccomp,profile=builtin", "name=no-new-privileges"];
    Daemon {
        unit: known(unit("active")),
        socket: known(Unit { listen: vec!["/run/docker.sock".into()], ..unit("active") }),
        flags: known(flags(&["host=fd://"])),
        next_flags: known(None),
        swarm: known(false),
        file: known(Written {
            path: "/etc/docker/daemon.json".into(),
            settings,
            changed: Some(Timestamp::from_second(STARTED - 1).unwrap()),
        }),
        in_force: known(Some(InForce {
            version: Some("26.1.5+dfsg1".into()),
            live_restore: Some(true),
            security: Some(security.map(str::to_owned).into()),
            log_driver: Some("json-file".into()),
            swarm: false,
        })),
        bridge: known(Some(Bridge { icc: Some(false) })),
        doors: known(vec![]),
        containers: known(vec![]),
        gate: known("open".into()),
        off_volume: known(None),
    }
}

/// All that is asked for, with changes.
fn file(changes: Value) -> Value {
    let mut all = json!({
        "live-restore": true, "no-new-privileges": true, "userland-proxy": false, "icc": false,
        "log-opts": {"max-size": "10m", "max-file": "5"},
    });
    let Value::Object(changes) = changes else { panic!() };
    for (key, value) in changes {
        all[&key] = value;
    }
    all
}

fn good() -> Daemon {
    daemon(&file(json!({})))
}

/// Docker as it is installed.
fn plain() -> Daemon {
    let mut daemon = daemon(&json!({}));
    daemon.file = known(Written { changed: None, ..daemon.file.known().unwrap().clone() });
    daemon.in_force = known(Some(InForce {
        live_restore: Some(false),
        security: Some(vec!["name=apparmor".into(), "name=seccomp,profile=builtin".into()]),
        ..force(&daemon)
    }));
    daemon.bridge = known(Some(Bridge { icc: Some(true) }));
    daemon
}

fn down(mut daemon: Daemon) -> Daemon {
    daemon.unit = known(unit("inactive"));
    daemon.in_force = known(None);
    daemon.bridge = known(None);
    daemon
}

fn force(daemon: &Daemon) -> InForce {
    daemon.in_force.known().unwrap().clone().unwrap()
}

fn flags(words: &[&str]) -> Vec<Flag> {
    let split = |word: &&str| {
        let (name, value) = word.split_once('=').unwrap_or((word, ""));
        Flag { name: name.into(), value: value.into() }
    };
    words.iter().map(split).collect()
}

fn config(mode: Hardening, migrate: Migrate) -> Config {
    let mut config = Config::default();
    config.docker.daemon = mode;
    config.docker.migrate = migrate;
    config
}

fn outcome(daemon: Daemon) -> (String, String) {
    with(&config(Hardening::Enforce, Migrate::Stopped), daemon)
}

fn with(config: &Config, daemon: Daemon) -> (String, String) {
    let facts = Facts { daemon: Some(daemon) };
    let verdict = match DockerDaemon.judge(config, &facts) {
        Ok(verdict) => format!("{}: {}", verdict.word(), verdict.sentence()),
        Err(Unknown(why)) => format!("unknown: {why}"),
    };
    let texts =
        |steps: &[Step]| steps.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
    let plan = match DockerDaemon.plan(config, &facts) {
        Ok(Plan::Nothing) => String::new(),
        Ok(Plan::Steps(steps)) => texts(&steps),
        Ok(Plan::Contain { steps, why }) => format!("{}; refuse: {why}", texts(&steps)),
        Ok(Plan::Refuse { why }) => format!("refuse: {why}"),
        Err(Unknown(why)) => format!("unknown: {why}"),
    };
    (verdict, plan)
}

const ALL: &str = "in Docker's configuration, set icc to false, log-opts.max-size to 10m, \
                   log-opts.max-file to 5, no-new-privileges to true, live-restore to true, \
                   userland-proxy to false";

#[test]
fn what_is_right_needs_nothing() {
    let (verdict, plan) = outcome(good());
    assert!(verdict.starts_with("pass: live-restore") && plan.is_empty(), "{verdict} {plan}");
    let (verdict, plan) = outcome(down(good()));
    assert!(verdict.starts_with("pass: Docker does not run") && plan.is_empty(), "{verdict}");
    let mut absent = plain();
    absent.unit = known(Unit { load_state: "not-found".into(), ..Unit::default() });
    assert_eq!(outcome(absent), ("not-applicable: Docker is not installed".into(), String::new()));
}

#[test]
fn docker_as_it_is_installed_is_put_right_at_once() {
    let (verdict, plan) = outcome(plain());
    for item in ["(CIS 2.2)", "(CIS 2.14)", "(CIS 2.15)", "(CIS 2.16)", "has no limit"] {
        assert!(verdict.starts_with("fail: ") && verdict.contains(item), "{item}: {verdict}");
    }
    assert_eq!(plan, format!("{ALL}, and restart docker.service"));
    assert_eq!(outcome(down(plain())).1, ALL);
    // That it is started is not for this control, where its storage is not in place.
    let mut closed = plain();
    closed.gate = unknown();
    let (verdict, plan) = outcome(closed);
    assert!(verdict.starts_with("fail") && plan.is_empty(), "{plan}");
    let at_start = |mode: Option<AtStart>| start(&Fact::new("t", Ok(mode))).to_string();
    let installed = plain();
    let (flags, written) =
        (installed.flags.known().unwrap().clone(), installed.file.known().unwrap().clone());
    let both = AtStart { flags: flags.clone(), written, swarm: false };
    assert_eq!(at_start(Some(both.clone())), format!("{ALL}, and start docker.service"));
    // With live-restore it would not start.
    let swarm = at_start(Some(AtStart { swarm: true, ..both }));
    assert!(swarm.contains("icc") && !swarm.contains("live-restore"), "{swarm}");
    let written = good().file.known().unwrap().clone();
    let right = AtStart { flags, written, swarm: false };
    assert_eq!(at_start(Some(right)), "start docker.service");
    assert_eq!(at_start(None), "start docker.service");
    assert_eq!(start(&unknown()).to_string(), "start docker.service");
}

#[test]
fn containers_that_run_are_not_stopped_without_consent() {
    let running = |mut daemon: Daemon| {
        daemon.containers = known(vec!["0123456789abcdef".into()]);
        daemon
    };
    // All is written, and what needs no restart taken up.
    let (_, plan) = outcome(running(plain()));
    let expected = format!("{ALL}, and have Docker read it again; refuse: ");
    assert!(plan.starts_with(&expected) && plan.contains("(0123456789ab)"), "{plan}");
    let consent = config(Hardening::Enforce, Migrate::Running);
    assert_eq!(with(&consent, running(plain())).1, format!("{ALL}, and restart docker.service"));
    // It is written, and waits.
    let mut waits = running(good());
    waits.file = known(Written {
        changed: Some(Timestamp::from_second(STARTED + 1).unwrap()),
        ..good().file.known().unwrap().clone()
    });
    waits.bridge = known(Some(Bridge { icc: Some(true) }));
    let (verdict, plan) = outcome(waits);
    assert!(verdict.contains("icc is true in the Docker that runs"), "{verdict}");
    assert!(plan.starts_with("refuse: Docker takes the rest up only"), "{plan}");
    // Live-restore alone stops nobody.
    let mut live = running(daemon(&file(json!({"live-restore": false}))));
    live.in_force = known(Some(InForce { live_restore: Some(false), ..force(&live) }));
    let expected =
        "in Docker's configuration, set live-restore to true, and have Docker read it again";
    assert_eq!(outcome(live).1, expected);
    let mut hidden = plain();
    hidden.containers = unknown();
    assert_eq!(outcome(hidden).1, "unknown: x");
}

#[test]
fn docker_is_not_restarted_to_leave_the_volume() {
    for off in [known(Some("--data-root /srv".into())), unknown()] {
        let (_, plan) = outcome(Daemon { off_volume: off, ..plain() });
        assert_eq!(plan, "");
    }
}

#[test]
fn what_docker_says_outdoes_what_the_file_says() {
    let cases: [(&str, Break); 7] = [
        ("live-restore is false in", |d| {
            d.in_force = known(Some(InForce { live_restore: Some(false), ..force(d) }));
        }),
        ("no-new-privileges is false in", |d| {
            let security = vec!["name=apparmor".into(), "name=seccomp,profile=/p.json".into()];
            d.in_force = known(Some(InForce { security: Some(security), ..force(d) }));
        }),
        ("icc is true in", |d| d.bridge = known(Some(Bridge { icc: Some(true) }))),
        ("the log driver is syslog", |d| {
            d.in_force = known(Some(InForce { log_driver: Some("syslog".into()), ..force(d) }));
        }),
        ("without a seccomp profile", |d| {
            let security =
                ["name=apparmor", "name=seccomp,profile=unconfined", "name=no-new-privileges"];
            let security = Some(security.map(str::to_owned).into());
            d.in_force = known(Some(InForce { security, ..force(d) }));
        }),
        ("without seccomp", |d| {
            let security = vec!["name=apparmor".into(), "name=no-new-privileges".into()];
            d.in_force = known(Some(InForce { security: Some(security), ..force(d) }));
        }),
        ("without AppArmor", |d| {
            let security =
                vec!["name=seccomp,profile=builtin".into(), "name=no-new-privileges".into()];
            d.in_force = known(Some(InForce { security: Some(security), ..force(d) }));
        }),
    ];
    for (i, (words, change)) in cases.into_iter().enumerate() {
        // Docker has read the file, and does otherwise: another start would not help.
        let mut read = good();
        change(&mut read);
        let (verdict, plan) = outcome(read);
        assert!(verdict.starts_with("fail") && verdict.contains(words), "{words}: {verdict}");
        assert!(plan.starts_with("refuse: "), "{words}: {plan}");
        // It has not.
        let mut stale = good();
        change(&mut stale);
        let written = stale.file.known().unwrap().clone();
        let changed = Some(Timestamp::from_second(STARTED + 1).unwrap());
        stale.file = known(Written { changed, ..written });
        let (_, plan) = outcome(stale);
        assert!(plan.starts_with("restart docker.service"), "{words}: {plan}");
        assert_eq!(plan.contains("refuse"), i > 4, "{words}: {plan}");
    }
    // No default bridge, now and at the next start.
    let mut none = daemon(&file(json!({"bridge": "none", "icc": true})));
    assert!(
        outcome(down(daemon(&file(json!({"bridge": "none", "icc": true}))))).0.starts_with("pass")
    );
    assert!(
        outcome(daemon(&file(json!({"bridge": "none", "icc": true})))).0.contains("icc is true")
    );
    none.bridge = known(None);
    assert!(outcome(none).0.starts_with("pass"));
    let mut gone = daemon(&file(json!({"icc": true})));
    gone.bridge = known(None);
    assert!(outcome(gone).0.contains("icc is true"));
    // SELinux instead.
    let mut other = good();
    let security = ["name=selinux", "name=seccomp,profile=builtin", "name=no-new-privileges"];
    let security = Some(security.map(str::to_owned).into());
    other.in_force = known(Some(InForce { security, ..force(&other) }));
    assert!(outcome(other).0.starts_with("pass"));
}

#[test]
fn a_file_that_docker_has_not_read_counts_for_nothing() {
    let mut stale = good();
    let written = stale.file.known().unwrap().clone();
    stale.file = known(Written {
        changed: Some(Timestamp::from_second(STARTED + 1).unwrap()),
        ..written.clone()
    });
    let (verdict, plan) = outcome(stale);
    assert!(verdict.starts_with("fail: ") && verdict.contains("has changed since"), "{verdict}");
    assert_eq!(plan, "restart docker.service");
    let mut unsaid = good();
    unsaid.unit = known(Unit { main_started: None, ..unit("active") });
    assert!(outcome(unsaid).0.starts_with("unknown: systemd does not say when"));
}

#[test]
fn each_key_is_judged_and_set() {
    let table = [
        (json!({"icc": true}), "set icc to false"),
        (json!({"userland-proxy": true}), "set userland-proxy to false"),
        (json!({"no-new-privileges": false}), "set no-new-privileges to true"),
        (json!({"seccomp-profile": "unconfined"}), "set seccomp-profile to its default"),
        (json!({"seccomp-profile": "/etc/docker/seccomp.json"}), ""),
        (json!({"log-opts": {"max-size": "10m"}}), "set log-opts.max-file to 5"),
        (json!({"log-opts": {"max-size": "-1", "max-file": "3"}}), "set log-opts.max-size to 10m"),
        (json!({"log-opts": {"max-size": "0", "max-file": "3"}}), "set log-opts.max-size to 10m"),
        (json!({"log-opts": {"max-size": "1.5GB", "max-file": "0"}}), "set log-opts.max-file to 5"),
        (json!({"log-opts": null}), "set log-opts.max-size to 10m, log-opts.max-file to 5"),
        (json!({"log-driver": "local", "log-opts": {}}), ""),
        (
            json!({"log-driver": "local", "log-opts": {"max-size": "-1"}}),
            "set log-opts.max-size to 10m",
        ),
        (json!({"log-driver": "journald", "log-opts": {}}), ""),
    ];
    for (changes, expected) in table {
        let mut daemon = daemon(&file(changes.clone()));
        if let Some(driver) = changes.get("log-driver").and_then(Value::as_str) {
            let driver = Some(driver.to_owned());
            daemon.in_force = known(Some(InForce { log_driver: driver, ..force(&daemon) }));
        }
        let (verdict, plan) = outcome(daemon);
        if expected.is_empty() {
            assert!(verdict.starts_with("pass") && plan.is_empty(), "{changes}: {verdict} {plan}");
        } else {
            let expected =
                format!("in Docker's configuration, {expected}, and restart docker.service");
            assert!(verdict.starts_with("fail"), "{changes}: {verdict}");
            assert_eq!(plan, expected, "{changes}");
        }
    }
    // What Docker itself would not understand.
    for odd in [
        json!({"icc": "no"}),
        json!({"live-restore": 1}),
        json!({"log-driver": 1}),
        json!({"log-opts": {"max-size": 10, "max-file": "1"}}),
        json!({"hosts": "tcp://:2375"}),
        json!({"hosts": [1]}),
        json!({"hosts": ["tcp://:2376"], "tlsverify": "yes"}),
        json!({"seccomp-profile": {}}),
    ] {
        let (verdict, plan) = outcome(daemon(&file(odd.clone())));
        assert!(verdict.starts_with("unknown") && plan.starts_with("unknown"), "{odd}: {verdict}");
    }
}

#[test]
fn what_a_flag_sets_is_not_written() {
    let table = [
        ("icc=true", json!({"icc": null}), "sets icc to true"),
        ("userland-proxy", json!({"userland-proxy": null}), "sets userland-proxy to true"),
        ("live-restore=0", json!({"live-restore": null}), "sets live-restore to false"),
        ("seccomp-profile=unconfined", json!({}), "seccomp-profile is unconfined"),
        ("log-opt=tag=x", json!({"log-opts": null}), "--log-opt max-size=10m --log-opt max-file=5"),
        // With both it would not start.
        ("icc=false", json!({}), "icc is in /etc/docker/daemon.json, and --icc on"),
        ("log-opt=max-size=1m", json!({}), "log-opts is in /etc/docker/daemon.json, and --log-opt"),
    ];
    for (flag, changes, words) in table {
        let mut settings = file(changes);
        settings.as_object_mut().unwrap().retain(|_, value| !value.is_null());
        let mut daemon = daemon(&settings);
        daemon.flags = known(flags(&["host=fd://", flag]));
        let (verdict, plan) = outcome(daemon);
        assert!(verdict.starts_with("fail"), "{flag}: {verdict}");
        assert!(plan.starts_with("refuse: ") && plan.contains(words), "{flag}: {plan}");
    }
    let mut right = daemon(&json!({"log-driver": "local"}));
    right.flags = known(flags(&[
        "icc=false",
        "userland-proxy=f",
        "live-restore",
        "no-new-privileges=1",
        "log-opt=max-size=1m",
    ]));
    right.in_force = known(Some(InForce { log_driver: Some("local".into()), ..force(&right) }));
    assert!(outcome(right).0.starts_with("pass"));
    let mut odd = good();
    odd.flags = known(flags(&["tlsverify=maybe", "host=tcp://:2376"]));
    assert!(outcome(odd).0.starts_with("unknown"));
}

#[test]
fn what_the_unit_says_now_counts_for_the_next_start() {
    let next = |file: Value, words: &[&str]| {
        let mut daemon = daemon(&file);
        daemon.next_flags = known(Some(flags(words)));
        outcome(daemon)
    };
    let (verdict, plan) = next(file(json!({})), &["host=fd://"]);
    assert!(verdict.starts_with("pass") && plan.is_empty(), "{verdict}");
    let (verdict, plan) = next(file(json!({})), &["host=fd://", "icc=true"]);
    assert!(verdict.contains("at Docker's next start, icc is in /etc/docker"), "{verdict}");
    assert!(plan.starts_with("refuse: at Docker's next start, icc is in"), "{plan}");
    let (verdict, _) = next(file(json!({})), &["host=fd://", "host=tcp://:2375"]);
    assert!(verdict.contains("next start, Docker is told to listen on tcp://:2375"), "{verdict}");
    // A flag that was removed, and nothing in its place.
    let mut without = file(json!({}));
    without.as_object_mut().unwrap().remove("icc");
    let mut gone = daemon(&without);
    gone.flags = known(flags(&["icc=false"]));
    gone.next_flags = known(Some(flags(&["host=fd://"])));
    let (verdict, plan) = outcome(gone);
    assert!(verdict.contains("at Docker's next start, icc is true (CIS 2.2)"), "{verdict}");
    assert_eq!(plan, "in Docker's configuration, set icc to false, and restart docker.service");
    // One thing is said once.
    let mut both = plain();
    both.next_flags = known(Some(flags(&["host=fd://"])));
    let (verdict, plan) = outcome(both);
    assert!(!verdict.contains("next start"), "{verdict}");
    assert_eq!(plan, format!("{ALL}, and restart docker.service"));
}

#[test]
fn an_old_docker_does_not_say_whether_privileges_are_gained() {
    let silent = |version: Option<&str>| {
        let mut daemon = good();
        let security = ["name=apparmor", "name=seccomp,profile=default"].map(str::to_owned);
        daemon.in_force = known(Some(InForce {
            version: version.map(str::to_owned),
            security: Some(security.into()),
            ..force(&daemon)
        }));
        daemon
    };
    let (verdict, plan) = outcome(silent(Some("20.10.24+dfsg1")));
    assert!(verdict.starts_with("pass") && plan.is_empty(), "{verdict} {plan}");
    assert!(outcome(silent(Some("24.0.0"))).0.contains("no-new-privileges is false in"));
    for version in [None, Some("dev")] {
        assert!(outcome(silent(version)).0.starts_with("unknown: Docker does not say what its"));
    }
    // The file counts only as it was read.
    let mut stale = silent(Some("20.10.24+dfsg1"));
    let written = stale.file.known().unwrap().clone();
    let changed = Some(Timestamp::from_second(STARTED + 1).unwrap());
    stale.file = known(Written { changed, ..written });
    let (verdict, plan) = outcome(stale);
    assert!(verdict.contains("does not say what no-new-privileges it has (CIS 2.14)"), "{verdict}");
    assert_eq!(plan, "restart docker.service");
}

#[test]
fn docker_is_commanded_by_nobody_without_a_certificate() {
    let table: [(&str, &str, Value, bool); 15] = [
        ("host=tcp://0.0.0.0:2375", "", json!({}), false),
        // dockerd cuts white space off, and takes nothing but that as its default.
        ("host= tcp://0.0.0.0:2375", "", json!({}), false),
        ("host= unix:///run/docker.sock", "", json!({}), true),
        ("tls", "", json!({"hosts": [" tcp://0.0.0.0:2375"]}), false),
        ("tls", "", json!({"hosts": [" "]}), true),
        ("host=tcp://0.0.0.0:2376", "tlsverify", json!({}), true),
        ("host=tcp://0.0.0.0:2376", "tlsverify=false", json!({}), false),
        ("host=tcp://0.0.0.0:2376", "tls", json!({}), false),
        ("host=0.0.0.0:2375", "", json!({}), false),
        ("host=:2375", "", json!({}), false),
        ("host=unix:///run/docker.sock", "", json!({}), true),
        ("tls", "", json!({"hosts": ["unix:///x", "tcp://127.0.0.1:2375"]}), false),
        ("tls", "", json!({"hosts": ["fd://", "tcp://10.0.0.1:2376"], "tlsverify": true}), true),
        ("tls", "", json!({"hosts": ["unix:///x"]}), true),
        ("tls", "", json!({"hosts": ["tcp://:2376"], "tls": true}), false),
    ];
    for (one, two, changes, fits) in table {
        let mut daemon = daemon(&file(changes.clone()));
        daemon.flags = known(flags(&[one, two]));
        let (verdict, plan) = outcome(daemon);
        assert_eq!(verdict.starts_with("pass"), fits, "{one} {two} {changes}: {verdict}");
        assert_eq!(plan.starts_with("refuse: Docker is told to listen"), !fits, "{plan}");
    }
    for address in ["[::]:2375", "[fe80::1%eth0]:2375", "vsock:2:2375"] {
        let mut socket = good();
        socket.socket = known(Unit { listen: vec![address.into()], ..unit("active") });
        assert!(outcome(socket).0.contains(&format!("listen on {address}")), "{address}");
    }
    // Whatever it was told, what answers is open; and what Docker holds for a container is not.
    let door = |open| Door { address: "0.0.0.0:2376".parse().unwrap(), open, unclear: None };
    let mut daemon = daemon(&file(json!({"hosts": ["tcp://:2376"], "tlsverify": true})));
    daemon.doors = known(vec![door(false)]);
    daemon.flags = known(vec![]);
    assert!(outcome(daemon).0.starts_with("pass"));
    // With the flag that the packages' units have, Docker's next start would fail.
    let both = self::daemon(&file(json!({"hosts": ["unix:///run/docker.sock"]})));
    assert!(outcome(both).0.contains("hosts is in /etc/docker/daemon.json, and --host"));
    let mut open = good();
    open.doors = known(vec![door(false), door(true)]);
    assert!(outcome(open).0.contains("answers anybody who reaches 0.0.0.0:2376"));
}

#[test]
fn an_api_that_does_not_answer_is_not_closed() {
    let unclear = |port: u16| Door {
        address: format!("0.0.0.0:{port}").parse().unwrap(),
        open: false,
        unclear: Some("nothing within 15s".into()),
    };
    let told = |host: &str| daemon(&file(json!({"hosts": [host], "tlsverify": true})));
    let changed_later = |daemon: &mut Daemon| {
        let written = daemon.file.known().unwrap().clone();
        let changed = Some(Timestamp::from_second(STARTED + 1).unwrap());
        daemon.file = known(Written { changed, ..written });
    };
    let table = [
        (told("tcp://0.0.0.0:2376"), 2376, true),
        (told(" tcp://10.0.0.1:2376/"), 2376, true),
        // Docker knows the port.
        (told("tcp://10.0.0.1"), 2376, true),
        // A published port of a container, with and without an API.
        (told("tcp://0.0.0.0:2376"), 8080, false),
        (good(), 8080, false),
    ];
    for (i, (mut daemon, port, is_unknown)) in table.into_iter().enumerate() {
        daemon.flags = known(vec![]);
        daemon.doors = known(vec![unclear(port)]);
        let (verdict, _) = outcome(daemon);
        assert_eq!(verdict.starts_with("unknown: whether Docker"), is_unknown, "{i}: {verdict}");
        assert_eq!(verdict.starts_with("pass"), !is_unknown, "{i}: {verdict}");
    }
    // It was started with another file, which may have had hosts.
    let mut stale = good();
    changed_later(&mut stale);
    stale.doors = known(vec![unclear(8080)]);
    let (found, why) = rules::look(&stale.seen().unwrap());
    assert!(why.iter().any(|why| why.contains("at 0.0.0.0:8080")), "{} {why:?}", found.len());
}

#[test]
fn units_that_systemd_has_not_read_are_read_first() {
    let stale: [Break; 2] = [
        |d| d.socket = known(Unit { need_daemon_reload: true, ..unit("active") }),
        |d| d.unit = known(Unit { need_daemon_reload: true, ..unit("active") }),
    ];
    for (name, stale) in ["docker.socket", "docker.service"].into_iter().zip(stale) {
        for mut daemon in [good(), plain()] {
            stale(&mut daemon);
            let (verdict, plan) = outcome(daemon);
            assert_eq!(
                verdict,
                format!("fail: the files of {name} changed since systemd read them")
            );
            assert_eq!(plan, "make systemd read its units again");
        }
        let mut daemon = good();
        stale(&mut daemon);
        let (verdict, plan) = with(&config(Hardening::Report, Migrate::Stopped), daemon);
        assert!(
            verdict.starts_with("unknown: the files of") && plan.is_empty(),
            "{verdict} {plan}"
        );
    }
}

#[test]
fn a_swarm_excludes_live_restore() {
    let mut swarm = daemon(&file(json!({"live-restore": false})));
    let in_force = InForce { live_restore: Some(false), swarm: true, ..force(&swarm) };
    swarm.in_force = known(Some(in_force));
    let (verdict, plan) = outcome(swarm);
    assert!(verdict.starts_with("fail") && plan.contains("part of a swarm"), "{plan}");
    // It does not run, and is part of one.
    let mut stopped = down(daemon(&file(json!({"live-restore": false}))));
    stopped.swarm = known(true);
    assert!(outcome(stopped).1.starts_with("refuse: live-restore is false: Docker is part"));
}

#[test]
fn what_cannot_be_seen_never_passes() {
    let hide: [Break; 13] = [
        |d| d.unit = unknown(),
        |d| d.unit = known(unit("activating")),
        |d| d.socket = unknown(),
        |d| d.flags = unknown(),
        |d| d.next_flags = unknown(),
        |d| d.swarm = unknown(),
        |d| d.file = unknown(),
        |d| d.in_force = unknown(),
        |d| d.in_force = known(None),
        |d| d.bridge = unknown(),
        |d| d.bridge = known(Some(Bridge { icc: None })),
        |d| d.doors = unknown(),
        |d| d.in_force = known(Some(InForce::default())),
    ];
    for (i, hide) in hide.into_iter().enumerate() {
        for mode in [Hardening::Enforce, Hardening::Report] {
            let mut daemon = good();
            hide(&mut daemon);
            let (verdict, plan) = with(&config(mode, Migrate::Stopped), daemon);
            assert!(verdict.starts_with("unknown"), "case {i}: {verdict}");
            assert_eq!(plan.starts_with("unknown"), mode == Hardening::Enforce, "case {i}: {plan}");
        }
    }
    let hide: [fn(&mut InForce); 3] =
        [|f| f.live_restore = None, |f| f.security = None, |f| f.log_driver = None];
    for (i, hide) in hide.into_iter().enumerate() {
        let mut daemon = good();
        let mut in_force = force(&daemon);
        hide(&mut in_force);
        daemon.in_force = known(Some(in_force));
        assert!(outcome(daemon).0.starts_with("unknown: Docker does not say"), "case {i}");
        // Something else is wrong, and that is a warning: what is unknown is more.
        let mut daemon = plain();
        let mut in_force = force(&daemon);
        hide(&mut in_force);
        daemon.in_force = known(Some(in_force));
        let report = config(Hardening::Report, Migrate::Stopped);
        assert!(with(&report, daemon).0.starts_with("unknown"), "case {i}");
    }
    let facts = Facts { daemon: None };
    assert!(DockerDaemon.judge(&Config::default(), &facts).is_err());
    assert!(DockerDaemon.plan(&Config::default(), &facts).is_err());
}

#[test]
fn report_says_it_and_changes_nothing() {
    let report = config(Hardening::Report, Migrate::Stopped);
    let (verdict, plan) = with(&report, plain());
    assert!(verdict.starts_with("pass: WARNING: icc is true (CIS 2.2)"), "{verdict}");
    assert_eq!(plan, "");
    let off = config(Hardening::Off, Migrate::Stopped);
    let facts = Facts { daemon: None };
    assert_eq!(DockerDaemon.judge(&off, &facts).unwrap().word(), "not-applicable");
    assert_eq!(DockerDaemon.plan(&off, &facts), Ok(Plan::Nothing));
}
