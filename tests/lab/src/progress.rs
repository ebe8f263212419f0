//! What the lab says about itself while it works: one line when a long step begins, one with the
//! elapsed time when it has ended, all on standard error. Standard output is for results.

use std::time::{Duration, Instant};

/// Prints one line of progress.
pub fn say(line: impl AsRef<str>) {
    eprintln!("lab: {}", line.as_ref());
}

/// A duration as people read it: `0.8 s`, `12.3 s`, `4 min 10 s`.
pub fn human(elapsed: Duration) -> String {
    let seconds = elapsed.as_secs_f64();
    if seconds < 100.0 {
        format!("{seconds:.1} s")
    } else {
        format!("{} min {:02} s", elapsed.as_secs() / 60, elapsed.as_secs() % 60)
    }
}

/// A step that takes long enough for somebody to wonder.
pub struct Step {
    what: String,
    started: Instant,
}

impl Step {
    /// Says that the step begins.
    pub fn begin(what: impl Into<String>) -> Self {
        let what = what.into();
        say(format!("{what} ..."));
        Self { what, started: Instant::now() }
    }

    /// Says that the step has ended, and how long it took.
    pub fn done(self) -> Duration {
        let elapsed = self.started.elapsed();
        say(format!("{}: done in {}", self.what, human(elapsed)));
        elapsed
    }
}
