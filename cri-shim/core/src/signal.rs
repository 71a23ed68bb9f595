//! Signals by name, as images and CRI give them, to the numbers Linux uses on x86-64 and arm64.

use cri_shim_api::v1::Signal;

/// `SIGTERM`, what a container is asked to stop with when nothing else is said.
pub const SIGTERM: u32 = 15;
/// `SIGKILL`.
pub const SIGKILL: u32 = 9;
const RTMIN: u32 = 34;
const RTMAX: u32 = 64;

const NAMES: [(&str, u32); 35] = [
    ("ABRT", 6),
    ("ALRM", 14),
    ("BUS", 7),
    ("CHLD", 17),
    ("CLD", 17),
    ("CONT", 18),
    ("FPE", 8),
    ("HUP", 1),
    ("ILL", 4),
    ("INT", 2),
    ("IO", 29),
    ("IOT", 6),
    ("KILL", 9),
    ("PIPE", 13),
    ("POLL", 29),
    ("PROF", 27),
    ("PWR", 30),
    ("QUIT", 3),
    ("SEGV", 11),
    ("STKFLT", 16),
    ("STOP", 19),
    ("SYS", 31),
    ("TERM", 15),
    ("TRAP", 5),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("USR1", 10),
    ("USR2", 12),
    ("VTALRM", 26),
    ("WINCH", 28),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("RTMIN", RTMIN),
];

/// The number of `SIGTERM`, `TERM`, `RTMIN+3`, `SIGRTMAX-2` or `15`; nothing for what is no signal.
pub fn number(name: &str) -> Option<u32> {
    if let Ok(number) = name.parse::<u32>() {
        return (1..=RTMAX).contains(&number).then_some(number);
    }
    let upper = name.to_ascii_uppercase();
    let short = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(offset) = short.strip_prefix("RTMIN").and_then(|rest| rest.strip_prefix(['+'])) {
        return offset.parse::<u32>().ok().map(|offset| RTMIN + offset).filter(|number| *number <= RTMAX);
    }
    if let Some(rest) = short.strip_prefix("RTMAX") {
        let offset = rest.strip_prefix('-').map_or(Ok(0), str::parse::<u32>).ok()?;
        return RTMAX.checked_sub(offset).filter(|number| *number >= RTMIN);
    }
    NAMES.iter().find(|(known, _)| *known == short).map(|(_, number)| *number)
}

/// The number of a signal as CRI names it; nothing for "the runtime's default".
pub fn from_cri(signal: Signal) -> Option<u32> {
    let name = signal.as_str_name().replace("PLUS", "+").replace("MINUS", "-");
    number(&name)
}

/// A signal number as CRI names it.
pub fn to_cri(number: u32) -> Signal {
    (1..=65)
        .filter_map(|value| Signal::try_from(value).ok())
        .find(|signal| from_cri(*signal) == Some(number))
        .unwrap_or(Signal::RuntimeDefault)
}

/// The signal that stops a container: CRI's choice, else the image's, else SIGTERM.
pub fn stop_signal(cri: Signal, image: Option<&str>) -> u32 {
    from_cri(cri).or_else(|| image.and_then(number)).unwrap_or(SIGTERM)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_numbers_and_real_time_signals() {
        let cases = [
            ("SIGTERM", Some(15)),
            ("quit", Some(3)),
            ("9", Some(9)),
            ("SIGRTMIN+3", Some(37)),
            ("RTMAX-2", Some(62)),
            ("SIGRTMAX", Some(64)),
            ("0", None),
            ("SIGNOPE", None),
        ];
        for (name, expected) in cases {
            assert_eq!(number(name), expected, "{name}");
        }
    }

    #[test]
    fn every_cri_signal_has_a_number() {
        for value in 1..=65 {
            let signal = Signal::try_from(value).unwrap();
            assert!(from_cri(signal).is_some(), "{signal:?}");
        }
        assert_eq!(from_cri(Signal::RuntimeDefault), None);
        assert_eq!(to_cri(3), Signal::Sigquit);
    }

    #[test]
    fn cri_overrides_the_image() {
        assert_eq!(stop_signal(Signal::RuntimeDefault, Some("SIGQUIT")), 3);
        assert_eq!(stop_signal(Signal::Sigusr1, Some("SIGQUIT")), 10);
        assert_eq!(stop_signal(Signal::RuntimeDefault, None), 15);
    }
}
