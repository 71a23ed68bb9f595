//! Rates through a ClusterIP ÷ direct as a picture: one line per way of forwarding, by the number of services.

use std::fmt::Write as _;

use super::report::{Figure, Report, Work};

const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 240.0;
const LEFT: f64 = 60.0;
const TOP: f64 = 50.0;
const COLORS: [&str; 5] = ["#2e8b57", "#c0392b", "#2c6fbb", "#8e44ad", "#7f8c8d"];

/// One panel for connections, one for requests.
pub(super) fn chart(report: &Report) -> String {
    let panels = ["Connections", "Requests"];
    let height = (TOP + HEIGHT + 40.0) * 2.0;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{height}\" font-family=\"sans-serif\" \
         font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
        LEFT + WIDTH + 160.0
    );
    let mut top = TOP;
    for panel in panels {
        draw(&mut text, report, panel, top);
        top += TOP + HEIGHT + 40.0;
    }
    text + "</svg>\n"
}

/// A way's ratio at each number of services.
type Line = (String, Vec<(usize, f64, f64, f64)>);

fn draw(text: &mut String, report: &Report, work: &str, top: f64) {
    // Writing to a String cannot fail, here and below.
    writeln!(
        text,
        "<text x=\"{LEFT}\" y=\"{:.0}\" font-size=\"14\">{work} per second through a ClusterIP ÷ direct</text>",
        top - 20.0
    )
    .ok();
    for tenth in [0.4, 0.6, 0.8, 1.0] {
        let y = height_of(tenth, top);
        writeln!(
            text,
            "<line x1=\"{LEFT}\" x2=\"{:.0}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#ddd\"/><text x=\"{:.0}\" \
             y=\"{:.1}\" text-anchor=\"end\" fill=\"#666\">{tenth}</text>",
            LEFT + WIDTH,
            LEFT - 8.0,
            y + 4.0
        )
        .ok();
    }
    let count = report.connections.len();
    for (index, way) in report.connections.iter().enumerate() {
        writeln!(
            text,
            "<text x=\"{:.1}\" y=\"{:.0}\" text-anchor=\"middle\" fill=\"#666\">{} services</text>",
            place(index, count),
            top + HEIGHT + 18.0,
            way.services
        )
        .ok();
    }
    for (number, (name, points)) in lines(report, work).into_iter().enumerate() {
        let color = COLORS[number % COLORS.len()];
        let path: Vec<String> = points
            .iter()
            .map(|(index, mean, _, _)| format!("{:.1},{:.1}", place(*index, count), height_of(*mean, top)))
            .collect();
        writeln!(
            text,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"2\"/>",
            path.join(" ")
        )
        .ok();
        for (index, mean, low, high) in &points {
            let x = place(*index, count);
            writeln!(
                text,
                "<circle cx=\"{x:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"{color}\"/><line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{:.1}\" \
                 y2=\"{:.1}\" stroke=\"{color}\"/>",
                height_of(*mean, top),
                height_of(*low, top),
                height_of(*high, top)
            )
            .ok();
        }
        if let Some((_, mean, _, _)) = points.last() {
            let y = height_of(*mean, top) + 4.0;
            writeln!(
                text,
                "<text x=\"{:.0}\" y=\"{y:.1}\" fill=\"{color}\">{name} {mean:.3}</text>",
                LEFT + WIDTH + 10.0
            )
            .ok();
        }
    }
}

fn lines(report: &Report, work: &str) -> Vec<Line> {
    let mut found: Vec<Line> = Vec::new();
    for (index, way) in report.connections.iter().enumerate() {
        for one in way.works.iter().filter(|one| one.kind == work) {
            for (name, figure) in ways_of(one) {
                let Some(ratio) = figure.ratio else { continue };
                let point = (index, ratio.mean, ratio.low, ratio.high);
                match found.iter_mut().find(|(known, _)| known == name) {
                    Some((_, points)) => points.push(point),
                    None => found.push((name.to_owned(), vec![point])),
                }
            }
        }
    }
    found
}

fn ways_of(work: &Work) -> impl Iterator<Item = (&str, &Figure)> {
    let own = [("keelson", &work.ours), ("direct again", &work.control)];
    own.into_iter().chain(work.peers.iter().map(|(name, figure)| (name.as_str(), figure)))
}

fn place(index: usize, count: usize) -> f64 {
    let number = |value: usize| f64::from(u32::try_from(value).unwrap_or(u32::MAX));
    LEFT + WIDTH * (number(index) + 0.5) / number(count.max(1))
}

/// Ratios from 0.4 to 1.1; what lies outside is drawn at the edge.
fn height_of(ratio: f64, top: f64) -> f64 {
    top + HEIGHT * (1.1 - ratio.clamp(0.4, 1.1)) / 0.7
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn better_is_higher_and_what_is_outside_stays_in_the_picture() {
        assert!(height_of(1.0, 0.0) < height_of(0.5, 0.0));
        assert!((height_of(0.1, 0.0) - HEIGHT).abs() < 1e-9);
        assert!(place(0, 4) < place(3, 4) && place(3, 4) < LEFT + WIDTH);
    }
}
