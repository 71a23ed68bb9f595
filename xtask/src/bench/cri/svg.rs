//! The ratios as a picture: one bar for each figure on a logarithmic axis, its interval, and its goal.

use std::fmt::Write as _;

use super::report::{Goal, Report, Row};

const ROW: f64 = 18.0;
const LEFT: f64 = 430.0;
const WIDTH: f64 = 420.0;
/// Ends of the axis: ratios outside are drawn at its ends.
const AXIS: (f64, f64) = (0.01, 4.0);

/// The picture of all rows that have a ratio.
pub(super) fn chart(report: &Report) -> String {
    let rows: Vec<&Row> = report.rows.iter().filter(|row| row.ratio.is_some()).collect();
    let count = f64::from(u32::try_from(rows.len()).unwrap_or(u32::MAX));
    let height = 60.0 + ROW * count;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{height}\" font-family=\"sans-serif\" \
         font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n<text x=\"10\" y=\"20\" \
         font-size=\"14\">keelson-cri ÷ containerd's CRI plugin (left of 1 is better)</text>\n",
        LEFT + WIDTH + 90.0
    );
    for tick in [0.01, 0.033, 0.1, 0.333, 1.0, 3.0] {
        let x = place(tick);
        let color = if (tick - 1.0).abs() < f64::EPSILON { "#444" } else { "#ddd" };
        // Writing to a String cannot fail, here and below.
        writeln!(
            text,
            "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"44\" y2=\"{height}\" stroke=\"{color}\"/>\
             <text x=\"{x:.1}\" y=\"40\" text-anchor=\"middle\" fill=\"#666\">{tick}</text>"
        )
        .ok();
    }
    let mut top = 50.0;
    for row in rows {
        bar(&mut text, row, top);
        top += ROW;
    }
    text + "</svg>\n"
}

fn bar(text: &mut String, row: &Row, top: f64) {
    let Some(ratio) = row.ratio else { return };
    let (x, middle) = (place(ratio), top + ROW / 2.0);
    let color = match row.met {
        Some(false) => "#c0392b",
        Some(true) => "#2e8b57",
        None => "#7f8c8d",
    };
    writeln!(
        text,
        "<text x=\"10\" y=\"{:.1}\">{}</text><rect x=\"{LEFT}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" \
         fill=\"{color}\" fill-opacity=\"0.75\"/><text x=\"{:.1}\" y=\"{:.1}\" fill=\"#333\">{ratio:.3}</text>",
        middle + 4.0,
        escape(&format!("{}: {}", row.group, row.name)),
        top + 3.0,
        x - LEFT,
        ROW - 6.0,
        LEFT + WIDTH + 12.0,
        middle + 4.0,
    )
    .ok();
    if let Some(interval) = row.interval {
        let (low, high) = (place(interval.low), place(interval.high));
        writeln!(
            text,
            "<line x1=\"{low:.1}\" x2=\"{high:.1}\" y1=\"{middle:.1}\" y2=\"{middle:.1}\" stroke=\"black\"/>"
        )
        .ok();
    }
    if let Goal::Ratio(limit) = row.goal {
        let x = place(limit);
        writeln!(
            text,
            "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{:.1}\" y2=\"{:.1}\" stroke=\"#2c3e50\" stroke-width=\"2\"/>",
            top + 1.0,
            top + ROW - 1.0
        )
        .ok();
    }
}

fn place(ratio: f64) -> f64 {
    let (low, high) = AXIS;
    let share = (ratio.clamp(low, high) / low).ln() / (high / low).ln();
    LEFT + WIDTH * share
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_axis_is_logarithmic_and_bounded() {
        assert!((place(0.01) - LEFT).abs() < 1e-9);
        assert!((place(0.0) - LEFT).abs() < 1e-9, "what is below the axis is at its end");
        assert!((place(4.0) - LEFT - WIDTH).abs() < 1e-9);
        assert!((place(0.2) - place(0.1) - (place(0.4) - place(0.2))).abs() < 1e-9);
    }
}
