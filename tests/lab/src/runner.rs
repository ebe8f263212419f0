//! Runs the tests of the workspace, those of the simulated cloud, and the scenarios, and counts
//! them all: the last line says how many passed and how many failed.

use crate::command::{cargo, line};
use crate::progress::{human, say};
use crate::scenarios::{ALL, Scenario};
use crate::stage::{Cuts, Props, Stage, Start};
use crate::{cloud, host, image, package, snapshot};
use anyhow::{Context as _, Result, ensure};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use tempfile::TempDir;

/// How the names of scenarios' work directories begin.
const WORK: &str = "hostagent-lab-";

/// How many passed and failed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Count {
    passed: usize,
    failed: usize,
}

impl Count {
    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

/// How scenarios are run.
#[derive(Debug, Clone)]
pub struct Options {
    /// How many side by side; by default, as many as the machine has processors for.
    pub jobs: Option<usize>,
    /// The package to test; by default one is built.
    pub deb: Option<PathBuf>,
    /// The Debian release of all instances, instead of each scenario's own.
    pub release: Option<String>,
    /// Whether scenarios that pass show the journal, console and calls, too.
    pub evidence: bool,
    /// The power cuts of the scenarios that make some.
    pub cuts: Cuts,
}

/// Prints the scenarios.
pub fn list() {
    for scenario in ALL {
        println!("{:24} {}", scenario.name, scenario.shows);
    }
}

/// Runs everything, or only the scenarios whose name contains one of the filters. Returns whether
/// all passed.
pub fn run(filters: &[String], options: Options) -> Result<bool> {
    let chosen: Vec<&Scenario> = ALL
        .iter()
        .filter(|scenario| {
            filters.is_empty()
                || filters.iter().any(|filter| scenario.name.contains(filter.as_str()))
        })
        .collect();
    ensure!(!chosen.is_empty(), "no scenario's name contains {}", filters.join(" or "));
    host::prepare()?;
    let mut count = Count::default();
    if filters.is_empty() {
        count.add(cargo_tests()?);
        count.add(cloud_tests()?);
    }
    count.add(scenarios(&chosen, options)?);
    println!("{} passed, {} failed", count.passed, count.failed);
    Ok(count.failed == 0 && count.passed > 0)
}

/// As many scenarios side by side as there are processors: each waits for a while, too. More than
/// four would be short of memory on some machines.
fn default_jobs() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| cores.get().min(4))
}

/// The tests of the workspace's crates.
fn cargo_tests() -> Result<Count> {
    let mut command = cargo();
    command.args(["test", "--workspace", "--locked", "--no-fail-fast"]);
    watch(&mut command, count_cargo)
}

/// The tests of the simulated cloud.
fn cloud_tests() -> Result<Count> {
    let mut command = Command::new(cloud::python()?);
    command.args(["-m", "unittest", "discover", "-s"]).arg(cloud::directory());
    command.env("PYTHONDONTWRITEBYTECODE", "1");
    command.current_dir(crate::cache::workspace());
    watch(&mut command, count_unittest)
}

/// Runs a test program, shows what it says, and counts by it. A program that fails without
/// saying which test did counts as one failure.
fn watch(command: &mut Command, count: fn(&str) -> Count) -> Result<Count> {
    say(line(command));
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {}", line(command)))?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let said = Mutex::new(String::new());
    let show = |stream: Option<Box<dyn Read + Send>>| {
        for text in stream.into_iter().flat_map(|stream| BufReader::new(stream).split(b'\n')) {
            let Ok(text) = text else { return };
            let text = String::from_utf8_lossy(&text);
            eprintln!("{text}");
            if let Ok(mut said) = said.lock() {
                said.push_str(&text);
                said.push('\n');
            }
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| show(stderr.map(|stream| Box::new(stream) as _)));
        show(stdout.map(|stream| Box::new(stream) as _));
    });
    let status = child.wait()?;
    let mut count = count(&said.into_inner().unwrap_or_default());
    if !status.success() && count.failed == 0 {
        println!("FAILED {}: {status}", line(command));
        count.failed = 1;
    }
    Ok(count)
}

/// Counts cargo's lines `test result: ok. 12 passed; 0 failed; …`.
fn count_cargo(said: &str) -> Count {
    let mut count = Count::default();
    for result in said.lines().filter_map(|line| line.trim().strip_prefix("test result: ")) {
        let words: Vec<&str> = result.split([' ', ';']).collect();
        let number = |word| number_before(&words, word);
        count.add(Count { passed: number("passed"), failed: number("failed") });
    }
    count
}

/// The number in front of a word.
fn number_before(words: &[&str], word: &str) -> usize {
    let pair = words.windows(2).find(|pair| pair[1] == word);
    pair.and_then(|pair| pair[0].parse().ok()).unwrap_or(0)
}

/// Counts Python's `Ran 12 tests in …`, and `FAILED (failures=1, errors=2)` if that follows.
fn count_unittest(said: &str) -> Count {
    let numbers = |line: &str| -> Vec<usize> {
        line.split(|c: char| !c.is_ascii_digit()).filter_map(|word| word.parse().ok()).collect()
    };
    let line = |start: &str| said.lines().rfind(|line| line.starts_with(start));
    let ran = line("Ran ").and_then(|line| numbers(line).first().copied()).unwrap_or(0);
    let failed = line("FAILED (").map_or(0, |line| {
        let parts = line.split([',', '(']).map(str::trim);
        parts
            .filter(|part| part.starts_with("failures=") || part.starts_with("errors="))
            .flat_map(numbers)
            .sum()
    });
    Count { passed: ran.saturating_sub(failed), failed }
}

/// Runs scenarios, several side by side if asked to.
fn scenarios(chosen: &[&Scenario], options: Options) -> Result<Count> {
    let Options { jobs, deb, release, evidence, cuts } = options;
    let jobs = jobs.unwrap_or_else(default_jobs);
    let release = |scenario: &Scenario| release.as_deref().unwrap_or(scenario.release).to_owned();
    remove_old_work();
    let package = if chosen.iter().all(|scenario| scenario.start == Start::Booted) {
        None
    } else {
        Some(package::given_or_built(deb)?)
    };
    let mut chosen = chosen.to_vec();
    if let Some(package) = &package
        && !package::fits_oldest(package)?
    {
        let before = chosen.len();
        chosen.retain(|scenario| release(scenario) != image::OLDEST_RELEASE);
        if chosen.len() < before {
            say(format!(
                "{} scenarios on Debian {} are left out: this package was built on a newer release, \
                 and does not install there",
                before - chosen.len(),
                image::OLDEST_RELEASE
            ));
        }
    }
    // Made before the clock of a scenario runs.
    let mut props = BTreeMap::new();
    for release in chosen.iter().map(|scenario| release(scenario)).collect::<BTreeSet<_>>() {
        let image = image::Image::of(&release)?;
        snapshot::Snapshot::booted(&image)?;
        if let Some(package) = &package {
            snapshot::Snapshot::installed(&image, package)?;
        }
        props.insert(release, Props { image, package: package.clone(), cuts });
    }
    let next = AtomicUsize::new(0);
    let count = Mutex::new(Count::default());
    std::thread::scope(|scope| {
        for _ in 0..jobs.clamp(1, chosen.len().max(1)) {
            scope.spawn(|| {
                while let Some(scenario) = chosen.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let passed = one(scenario, &props[&release(scenario)], evidence);
                    let this = Count { passed: passed.into(), failed: (!passed).into() };
                    count.lock().unwrap_or_else(std::sync::PoisonError::into_inner).add(this);
                }
            });
        }
    });
    Ok(count.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner))
}

/// Runs one scenario and says how it went. The work directory stays when it failed.
fn one(scenario: &Scenario, props: &Props, always: bool) -> bool {
    let started = Instant::now();
    let name = scenario.name;
    let (dir, _lock) = match work_directory(name) {
        Ok(both) => both,
        Err(error) => {
            println!("FAILED {name}: {error:#}");
            return false;
        }
    };
    let mut evidence = String::new();
    let result = Stage::set(props, dir.path(), scenario.start).and_then(|mut stage| {
        // A panic is this scenario's failure, and not the end of the others.
        let run = std::panic::AssertUnwindSafe(|| (scenario.run)(&mut stage));
        let result = std::panic::catch_unwind(run)
            .unwrap_or_else(|_| Err(anyhow::anyhow!("the scenario panicked (see above)")));
        if result.is_err() || always {
            evidence = stage.evidence();
        }
        result
    });
    match result {
        Ok(()) => {
            eprint!("{evidence}");
            println!("ok {name} ({})", human(started.elapsed()));
            true
        }
        Err(error) => {
            let dir = dir.keep();
            eprintln!("{evidence}");
            println!("FAILED {name}: {error:#}");
            say(format!(
                "the work directory of {name} is kept until the next run: {}",
                dir.display()
            ));
            false
        }
    }
}

/// Makes a scenario's work directory, with a lock in it that says that it is in use.
fn work_directory(name: &str) -> Result<(TempDir, File)> {
    let dir = tempfile::Builder::new()
        .prefix(&format!("{WORK}{name}-"))
        .tempdir()
        .context("making a work directory")?;
    let lock = crate::cache::lock(&dir.path().join("lock"), "nobody")?;
    Ok((dir, lock))
}

/// Removes the work directories of failed scenarios and killed runs: each is half a gigabyte.
fn remove_old_work() {
    let Ok(entries) = fs::read_dir(std::env::temp_dir()) else { return };
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with(WORK)
            && File::open(entry.path().join("lock")).is_ok_and(|lock| lock.try_lock().is_ok())
        {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_cargo_and_python() {
        let cargo = "running 3 tests\ntest result: ok. 12 passed; 0 failed; 1 ignored; finished\n\
                     test result: FAILED. 2 passed; 3 failed; 0 ignored; finished\n";
        assert_eq!(count_cargo(cargo), Count { passed: 14, failed: 3 });
        let python = "Ran 7 tests in 0.123s\n\nFAILED (failures=1, errors=2, skipped=4)\n";
        assert_eq!(count_unittest(python), Count { passed: 4, failed: 3 });
        let python = "Ran 7 tests in 0.123s\n\nOK\n";
        assert_eq!(count_unittest(python), Count { passed: 7, failed: 0 });
    }

    #[test]
    fn names_are_unique() {
        for (at, scenario) in ALL.iter().enumerate() {
            assert!(ALL[..at].iter().all(|other| other.name != scenario.name), "{}", scenario.name);
        }
    }
}
