use super::*;
use anyhow::anyhow;
use std::path::PathBuf;

fn known<T>(value: T) -> Fact<T> {
    Fact::new("t", Ok(value))
}

fn unit(active: &str, file: &str) -> Unit {
    Unit {
        load_state: "loaded".into(),
        active_state: active.into(),
        unit_file_state: file.into(),
        ..Unit::default()
    }
}

/// `ssh.socket` on these ports, in both families.
fn socket(active: &str, file: &str, ports: &[u16]) -> Fact<Unit> {
    let listen = ports.iter().flat_map(|port| [format!("0.0.0.0:{port}"), format!("[::]:{port}")]);
    known(Unit { listen: listen.collect(), ..unit(active, file) })
}

fn listening(port: u16, owned: bool) -> Listener {
    Listener { address: SocketAddr::new(LOOPBACKS[0], port), owned }
}

fn effective(addresses: &[&str]) -> Effective {
    Effective { listen: addresses.iter().map(|text| text.parse().unwrap()).collect() }
}

/// sshd listens on 2222 if anything answers there, and on 22 if `on_22`.
fn facts(ports: &[u16], v4: Answer, v6: Answer, on_22: bool) -> Facts {
    let up = v4 != Answer::Refused;
    let answers = LOOPBACKS
        .into_iter()
        .zip([v4, v6])
        .map(|(ip, answer)| Knock { address: SocketAddr::new(ip, 2222), answer: known(answer) })
        .collect();
    let list = |on: bool, port| if on { vec![listening(port, true)] } else { vec![] };
    let any = ports.iter().flat_map(|port| [format!("[::]:{port}"), format!("0.0.0.0:{port}")]);
    let any: Vec<String> = any.collect();
    Facts {
        effective: known(effective(&any.iter().map(|text| &**text).collect::<Vec<_>>())),
        lines: known(vec![]),
        options: known(vec![]),
        running: known(None),
        service: known(unit("active", "enabled")),
        socket: socket("inactive", "disabled", &[22]),
        answers,
        listeners: known(list(up, 2222)),
        port_22: known(list(on_22, 22)),
    }
}

fn banner() -> Answer {
    Answer::Banner("SSH-2.0-OpenSSH_10.0".into())
}

fn good() -> Facts {
    facts(&[2222], banner(), banner(), false)
}

fn outcome(facts: &Facts) -> (&'static str, &'static str) {
    let config = Config::default();
    let word = SshdPort.judge(&config, facts).map_or("unknown", |v| v.word());
    let plan = match SshdPort.plan(&config, facts) {
        Ok(Plan::Nothing) => "nothing",
        Ok(Plan::Steps(steps)) => match &steps[..] {
            [Step::MoveSshd { change }] if change.port == 2222 => "move",
            [Step::StartUnit { .. }] => "start",
            _ => panic!("{steps:?}"),
        },
        Ok(Plan::Contain { .. }) => "move and refuse",
        Ok(Plan::Refuse { .. }) | Err(_) => "refuse",
    };
    (word, plan)
}

#[test]
fn only_a_banner_in_every_family_and_silence_on_22_pass() {
    let not_ssh = || Answer::NotSsh("220".into());
    let table = [
        (good(), ("pass", "nothing")),
        (facts(&[2222], banner(), Answer::NoAddressFamily, false), ("pass", "nothing")),
        (facts(&[22], Answer::Refused, Answer::Refused, true), ("fail", "move")),
        (facts(&[22, 2222], banner(), banner(), true), ("fail", "move")),
        (facts(&[22, 2222], banner(), banner(), false), ("fail", "move")),
        (facts(&[2222], banner(), Answer::Refused, false), ("fail", "move")),
        (facts(&[2222], Answer::NoAddressFamily, banner(), false), ("fail", "move")),
        // Configured, and never reloaded: what listens counts.
        (facts(&[2222], Answer::Refused, Answer::Refused, true), ("fail", "move")),
        (facts(&[2222], banner(), banner(), true), ("fail", "move")),
        (facts(&[2222], not_ssh(), banner(), false), ("unknown", "refuse")),
    ];
    for (i, (facts, expected)) in table.iter().enumerate() {
        assert_eq!(outcome(facts), *expected, "row {i}");
    }
}

#[test]
fn the_socket_counts_where_it_listens_now_or_after_the_next_boot() {
    let with =
        |service: Unit, socket: Fact<Unit>| Facts { service: known(service), socket, ..good() };
    let idle = || unit("inactive", "disabled");
    let table = [
        // Nobody has connected yet, or somebody has.
        (with(idle(), socket("active", "enabled", &[2222])), ("pass", "nothing")),
        (
            with(unit("active", "disabled"), socket("active", "enabled", &[2222])),
            ("pass", "nothing"),
        ),
        // What it will listen on is not what it listens on.
        (with(idle(), socket("active", "enabled", &[22])), ("fail", "move")),
        (with(idle(), socket("active", "enabled", &[22, 2222])), ("fail", "move")),
        (with(idle(), socket("active", "enabled", &[])), ("fail", "move")),
        (with(unit("active", "disabled"), socket("inactive", "enabled", &[22])), ("fail", "move")),
        (
            with(unit("active", "enabled"), socket("inactive", "disabled", &[22])),
            ("pass", "nothing"),
        ),
        // Neither comes back.
        (with(idle(), socket("active", "disabled", &[2222])), ("fail", "refuse")),
        (
            with(unit("active", "disabled"), socket("inactive", "disabled", &[22])),
            ("fail", "refuse"),
        ),
        // Neither is there; what the next boot would start is started.
        (with(idle(), socket("failed", "enabled", &[2222])), ("fail", "start")),
        (with(unit("failed", "enabled"), socket("inactive", "disabled", &[22])), ("fail", "start")),
        (
            with(unit("reloading", "enabled"), socket("inactive", "disabled", &[])),
            ("fail", "refuse"),
        ),
        (with(idle(), socket("inactive", "disabled", &[22])), ("fail", "refuse")),
    ];
    for (i, (facts, expected)) in table.iter().enumerate() {
        assert_eq!(outcome(facts), *expected, "row {i}");
    }
    let mut stale = with(idle(), socket("active", "enabled", &[2222]));
    let socket_unit = stale.socket.known().unwrap().clone();
    stale.socket = known(Unit { need_daemon_reload: true, ..socket_unit });
    assert_eq!(outcome(&stale), ("fail", "move"));
    let mut both = facts(&[22], Answer::Refused, Answer::Refused, true);
    both.service = known(unit("active", "disabled"));
    assert_eq!(outcome(&both), ("fail", "move and refuse"));
}

#[test]
fn a_process_for_each_connection_is_refused_wherever_it_listens() {
    let accepting = |active: &str, file: &str, ports: &[u16]| {
        let mut facts = good();
        let Ok(socket) = socket(active, file, ports).known().cloned() else { unreachable!() };
        facts.socket = known(Unit { accept: true, ..socket });
        outcome(&facts)
    };
    assert_eq!(accepting("active", "enabled", &[22]), ("fail", "refuse"));
    assert_eq!(accepting("active", "enabled", &[2222]), ("fail", "refuse"));
    assert_eq!(accepting("active", "disabled", &[2222]), ("fail", "refuse"));
    assert_eq!(accepting("inactive", "enabled", &[2222]), ("fail", "refuse"));
    // As Ubuntu 22.04 ships it.
    assert_eq!(accepting("inactive", "disabled", &[22]), ("pass", "nothing"));
}

#[test]
fn what_outdoes_sshds_files_is_refused_unless_it_says_the_same() {
    let told = |facts: Facts| {
        let told = Told { flag: 'p', value: "22".into() };
        outcome(&Facts { options: known(vec![told]), ..facts })
    };
    assert_eq!(told(facts(&[22], Answer::Refused, Answer::Refused, true)), ("fail", "refuse"));
    assert_eq!(told(facts(&[22], banner(), banner(), false)), ("fail", "refuse"));
    assert_eq!(told(good()), ("pass", "nothing"));
    // What runs was told otherwise: a reload would not help.
    let wrong = facts(&[22], Answer::Refused, Answer::Refused, true);
    let running = known(Some(vec![Told { flag: 'p', value: "22".into() }]));
    assert_eq!(outcome(&Facts { running, ..wrong }), ("fail", "refuse"));
    let unread = Fact::new("t", Err(anyhow!("unreadable")));
    let wrong = facts(&[22], Answer::Refused, Answer::Refused, true);
    assert_eq!(outcome(&Facts { options: unread, ..wrong }), ("fail", "refuse"));
}

#[test]
fn a_stranger_on_a_port_is_not_sshd() {
    let mut stranger = good();
    stranger.listeners = known(vec![listening(2222, true), listening(2222, false)]);
    assert_eq!(outcome(&stranger), ("fail", "refuse"));
    let mut on_22 = good();
    on_22.port_22 = known(vec![listening(22, false)]);
    assert_eq!(outcome(&on_22), ("fail", "refuse"));
}

#[test]
fn what_cannot_be_seen_never_passes() {
    let cases: [fn(&mut Facts); 7] = [
        |f| f.effective = Fact::new("t", Err(anyhow!("x"))),
        |f| f.service = Fact::new("t", Err(anyhow!("x"))),
        |f| f.socket = Fact::new("t", Err(anyhow!("x"))),
        |f| f.answers[1].answer = Fact::new("t", Err(anyhow!("x"))),
        |f| f.listeners = Fact::new("t", Err(anyhow!("x"))),
        |f| f.listeners = known(vec![]),
        |f| f.port_22 = Fact::new("t", Err(anyhow!("x"))),
    ];
    for (i, hide) in cases.into_iter().enumerate() {
        let mut facts = good();
        hide(&mut facts);
        assert_eq!(outcome(&facts), ("unknown", "refuse"), "case {i}");
    }
    let mut none = good();
    none.answers.clear();
    assert_eq!(outcome(&none).0, "fail");
    // What the files say is needed to change them, and for nothing else.
    let mut lines = facts(&[22], Answer::Refused, Answer::Refused, true);
    lines.lines = Fact::new("t", Err(anyhow!("x")));
    assert_eq!(outcome(&lines), ("fail", "refuse"));
    lines = Facts { lines: lines.lines, ..good() };
    assert_eq!(outcome(&lines), ("pass", "nothing"));
}

#[test]
fn as_little_as_possible_of_others_files_is_changed() {
    let line = |number, keyword: &str, text: &str| Line {
        file: PathBuf::from("/etc/ssh/sshd_config"),
        number,
        text: text.to_owned(),
        keyword: keyword.to_owned(),
        conditional: false,
        value: text.split(' ').skip(1).map(str::to_owned).collect(),
    };
    let port = |value: &str| line(1, "port", &format!("Port {value}"));
    let address = |value: &str| line(2, LISTEN_ADDRESS, &format!("ListenAddress {value}"));
    let any = effective(&["[::]:22", "0.0.0.0:22"]);
    let plan = |effective: &Effective, lines: &[Line]| {
        let change = change(2222, effective, lines);
        let addresses = change.addresses.iter().map(ToString::to_string).collect::<Vec<_>>();
        let edits = change.edits.iter().map(|e| (e.number, e.becomes.clone())).collect::<Vec<_>>();
        (addresses, edits)
    };
    let none = || (vec![], vec![]);
    assert_eq!(plan(&any, &[]), none());
    assert_eq!(plan(&any, &[port("2222")]), none());
    // Nobody names an address: ours outdo the port, and the file stays.
    let both = || vec!["0.0.0.0".to_owned(), "::".to_owned()];
    assert_eq!(plan(&any, &[port("22")]), (both(), vec![]));
    assert_eq!(plan(&any, &[port("22"), port("2222")]), (both(), vec![]));
    let v4 = effective(&["0.0.0.0:22"]);
    assert_eq!(plan(&v4, &[port("22")]), (vec!["0.0.0.0".to_owned()], vec![]));
    // Somebody names one: it stays the only one.
    let bound = effective(&["10.0.0.5:22"]);
    assert_eq!(plan(&bound, &[address("10.0.0.5")]), none());
    assert_eq!(plan(&bound, &[address("10.0.0.5:2222")]), none());
    let kept = Some("ListenAddress 10.0.0.5".to_owned());
    assert_eq!(plan(&bound, &[address("10.0.0.5:22")]), (vec![], vec![(2, kept.clone())]));
    let two = [port("22"), address("10.0.0.5:22")];
    assert_eq!(plan(&bound, &two), (vec![], vec![(1, None), (2, kept)]));
    assert_eq!(plan(&bound, &[port("22"), address("10.0.0.5")]), (vec![], vec![(1, None)]));
}

#[test]
fn an_address_of_its_own_is_where_sshd_must_answer() {
    let mut bound = good();
    bound.effective = known(effective(&["10.0.0.5:2222"]));
    bound.answers =
        vec![Knock { address: "10.0.0.5:2222".parse().unwrap(), answer: known(banner()) }];
    assert_eq!(outcome(&bound), ("pass", "nothing"));
    // An address that is not this machine's is not a family that it lacks.
    bound.answers.push(Knock {
        address: "[fd00::5]:2222".parse().unwrap(),
        answer: known(Answer::NoAddressFamily),
    });
    assert_eq!(outcome(&bound), ("fail", "move"));
}

#[test]
fn port_22_is_honoured_when_it_is_configured() {
    let mut config = Config::default();
    config.sshd.port = crate::config::Port::try_from(22).unwrap();
    let mut facts = facts(&[22], banner(), banner(), true);
    facts.socket = socket("active", "enabled", &[22]);
    for knock in &mut facts.answers {
        knock.address.set_port(22);
    }
    assert_eq!(SshdPort.judge(&config, &facts).unwrap().word(), "pass");
    assert_eq!(SshdPort.plan(&config, &facts), Ok(Plan::Nothing));
}
