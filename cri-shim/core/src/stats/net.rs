//! Counters of network interfaces, from `/proc/<pid>/net/dev`.

use super::number;

/// What went through one interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InterfaceCounters {
    /// Its name.
    pub name: String,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Packets received.
    pub rx_packets: u64,
    /// Receive errors.
    pub rx_errors: u64,
    /// Packets dropped while receiving.
    pub rx_dropped: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Send errors.
    pub tx_errors: u64,
    /// Packets dropped while sending.
    pub tx_dropped: u64,
}

/// The interfaces of a network namespace, without loopback.
pub fn interfaces(net_dev: &str) -> Vec<InterfaceCounters> {
    net_dev
        .lines()
        .filter_map(|line| {
            let (name, counters) = line.split_once(':')?;
            let counters: Vec<u64> = counters.split_ascii_whitespace().map(number).collect();
            // Received: bytes, packets, errs, drop, fifo, frame, compressed, multicast; then the same of what was sent.
            let (received, sent) = counters.split_at_checked(8).filter(|(_, sent)| sent.len() >= 4)?;
            (name.trim() != "lo").then(|| InterfaceCounters {
                name: name.trim().to_owned(),
                rx_bytes: received[0],
                rx_packets: received[1],
                rx_errors: received[2],
                rx_dropped: received[3],
                tx_bytes: sent[0],
                tx_packets: sent[1],
                tx_errors: sent[2],
                tx_dropped: sent[3],
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interface_lines() {
        let text = "Inter-|   Receive\n face |bytes\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  eth0: 10 1 2 5 0 0 0 0 20 4 3 6 0 0 0 0\n";
        let found = interfaces(text);
        assert_eq!(found.len(), 1);
        assert_eq!(
            (found[0].rx_bytes, found[0].rx_packets, found[0].rx_errors, found[0].rx_dropped),
            (10, 1, 2, 5)
        );
        assert_eq!(
            (found[0].tx_bytes, found[0].tx_packets, found[0].tx_errors, found[0].tx_dropped),
            (20, 4, 3, 6)
        );
    }
}
