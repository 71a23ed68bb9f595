//! The result: rows of ours, peer's, ratio and goal; on the terminal and as JSON.

use anyhow::Result;
use serde::Serialize;

use super::Arguments;
use super::memory::{Column, Sample};
use crate::bench::stats::{Interval, Round, plain_ratio, ratio};
use crate::cmd::Cmd;
use crate::cri_hosts::{Ground, Plugins};

/// What a row is held to.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Goal {
    /// Ours ÷ peer at the most.
    Ratio(f64),
    /// Ours at the most, in the row's unit.
    Ours(f64),
    /// Only told.
    None,
}

/// One figure of both sides.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    /// Heading above it.
    pub(crate) group: String,
    /// What was measured.
    pub(crate) name: String,
    /// Unit of both figures.
    pub(crate) unit: &'static str,
    /// Our figure.
    pub(crate) ours: f64,
    /// The peer's.
    pub(crate) peer: f64,
    /// Ours ÷ peer.
    pub(crate) ratio: Option<f64>,
    /// The ratio's 95 % interval.
    pub(crate) interval: Option<Interval>,
    /// What it is held to.
    pub(crate) goal: Goal,
    /// Whether it holds; `None` without a goal.
    pub(crate) met: Option<bool>,
}

impl Row {
    /// A statistic over interleaved rounds.
    pub(crate) fn of_rounds(
        group: &str,
        name: &str,
        unit: &'static str,
        rounds: &[Round],
        statistic: fn(&[f64]) -> f64,
        goal: Goal,
    ) -> Self {
        let all = |side: fn(&Round) -> &Vec<f64>| {
            statistic(&rounds.iter().flat_map(side).copied().collect::<Vec<f64>>())
        };
        let (ours, peer) = (all(|round| &round.0), all(|round| &round.1));
        let mut row = Self::plain(group, name, unit, ours, peer, goal);
        row.ratio = plain_ratio(rounds, statistic);
        row.interval = ratio(rounds, statistic);
        row.judged()
    }

    /// Two figures.
    pub(crate) fn plain(
        group: &str,
        name: &str,
        unit: &'static str,
        ours: f64,
        peer: f64,
        goal: Goal,
    ) -> Self {
        let ratio = (peer > 0.0).then(|| ours / peer);
        let (group, name) = (group.to_owned(), name.to_owned());
        Self { group, name, unit, ours, peer, ratio, interval: None, goal, met: None }.judged()
    }

    fn judged(mut self) -> Self {
        self.met = match self.goal {
            Goal::Ratio(limit) => self.ratio.map(|ratio| ratio <= limit),
            Goal::Ours(limit) => Some(self.ours <= limit),
            Goal::None => None,
        };
        self
    }

    /// Its line of the table.
    pub(crate) fn line(&self) -> String {
        let ratio = match (self.ratio, self.interval) {
            (Some(ratio), Some(interval)) => {
                format!("{ratio:.3} [{:.3}, {:.3}]", interval.low, interval.high)
            }
            (Some(ratio), None) => format!("{ratio:.3}"),
            _ => "-".to_owned(),
        };
        let goal = match self.goal {
            Goal::Ratio(limit) => format!("ratio ≤ {limit:.3}"),
            Goal::Ours(limit) => format!("ours ≤ {limit:.1}"),
            Goal::None => String::new(),
        };
        let met = self.met.map_or("", |met| if met { "met" } else { "NOT MET" });
        format!(
            "  {:<44} {:>9.2} {:>9.2} {:<11} {ratio:<22} {goal:<14} {met}",
            self.name, self.ours, self.peer, self.unit
        )
    }
}

/// Everything that was measured, and on what.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    containerd: String,
    runc: String,
    kernel: String,
    handler: String,
    cni: &'static str,
    seccomp: &'static str,
    rounds: u32,
    quick: bool,
    /// All figures.
    pub(super) rows: Vec<Row>,
    /// Memory by kind of process.
    pub(super) memory: Vec<Sample>,
}

impl Report {
    /// An empty report that tells what is measured on what.
    pub(super) fn new(arguments: &Arguments, ground: &Ground) -> Result<Self> {
        let first = |program: &str| -> Result<String> {
            let text = Cmd::new(program).args(["--version"]).dir(ground.repo()).output()?;
            Ok(text.lines().next().unwrap_or_default().to_owned())
        };
        Ok(Self {
            containerd: first("containerd")?,
            runc: first("runc")?,
            kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            handler: if arguments.handler.is_empty() { "default".into() } else { arguments.handler.clone() },
            cni: match arguments.cni {
                Plugins::Keelson => "keelson-bridge and keelson-ipam on both sides",
                Plugins::Reference => "Debian's bridge and host-local on both sides",
            },
            seccomp: if arguments.seccomp { "RuntimeDefault" } else { "Unconfined" },
            rounds: arguments.rounds(),
            quick: arguments.quick,
            rows: Vec::new(),
            memory: Vec::new(),
        })
    }

    /// The table.
    pub(super) fn print(&self) {
        println!(
            "\nkeelson-cri (handler {}) beside containerd's CRI plugin\n{}; {}; kernel {}\nCNI: {}; seccomp: {}; \
             {} interleaved rounds{}",
            self.handler,
            self.containerd,
            self.runc,
            self.kernel,
            self.cni,
            self.seccomp,
            self.rounds,
            if self.quick { " (quick: coarse figures)" } else { "" }
        );
        print_rows(&self.rows);
        self.print_memory();
        print_goals(&self.rows);
    }

    fn print_memory(&self) {
        if self.memory.is_empty() {
            return;
        }
        let line = |cells: Vec<String>| cells.join(" ");
        let heads = line(Column::ALL.iter().map(|column| format!("{:>18}", column.name())).collect());
        println!("\nPSS in MiB (processes)\n  {:<12} {:>5} {heads}", "side", "pods");
        for sample in &self.memory {
            let cells = Column::ALL.iter().map(|column| {
                let mib = sample.pss_mib.get(column).copied().unwrap_or_default();
                let count = sample.processes.get(column).copied().unwrap_or_default();
                format!("{:>18}", format!("{mib:.1} ({count})"))
            });
            let cells = line(cells.collect());
            println!("  {:<12} {:>5} {cells}", sample.side, sample.pods);
        }
    }
}

/// Prints rows below the headings of their groups.
pub(crate) fn print_rows(rows: &[Row]) {
    let mut group = "";
    for row in rows {
        if row.group != group {
            group = &row.group;
            println!(
                "\n{group:<46} {:>9} {:>9} {:<11} {:<22} {:<14}",
                "ours", "peer", "", "ratio [95 %]", "goal"
            );
        }
        println!("{}", row.line());
    }
}

/// Prints how many of the rows with a goal meet it.
pub(crate) fn print_goals(rows: &[Row]) {
    let judged: Vec<bool> = rows.iter().filter_map(|row| row.met).collect();
    let met = judged.iter().filter(|met| **met).count();
    println!("\ngoals met: {met} of {}", judged.len());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_goal_is_judged_by_its_own_figure() {
        let met = |ours, peer, goal| Row::plain("g", "n", "ms", ours, peer, goal).met;
        assert_eq!(met(1.0, 4.0, Goal::Ratio(0.333)), Some(true));
        assert_eq!(met(2.0, 4.0, Goal::Ratio(0.333)), Some(false));
        assert_eq!(met(2.0, 0.0, Goal::Ratio(0.333)), None, "no peer, no ratio");
        assert_eq!(met(5.0, 1.0, Goal::Ours(4.0)), Some(false));
        assert_eq!(met(5.0, 1.0, Goal::None), None);
    }
}
