//! Stop strings, matched across token borders.
//!
//! Each stop string keeps the length of its longest prefix that the text ends with (Knuth–Morris–Pratt), so a match
//! depends on the text alone and never on how tokens cut it, and each byte costs the same however long the strings are.
//! The text that could still become a stop string is held back.

/// Finds the first stop string in a text that arrives in pieces.
///
/// The match that ends first wins; of several that end together, the longest.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    patterns: Vec<Pattern>,
    include_stop: bool,
    held: String,
}

#[derive(Debug, Clone)]
struct Pattern {
    bytes: Vec<u8>,
    /// `failure[k]`: the longest proper prefix of the first `k + 1` bytes that is also their suffix.
    failure: Vec<usize>,
    matched: usize,
}

/// What a piece of text has released.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Released {
    /// Text that is certainly output.
    pub text: String,
    /// Whether a stop string has ended: `text` is the last.
    pub stopped: bool,
}

impl StopMatcher {
    /// A matcher for `stops` (empty ones are ignored); `include_stop` makes the stop string itself output.
    pub fn new(stops: &[String], include_stop: bool) -> StopMatcher {
        let patterns = stops.iter().filter(|stop| !stop.is_empty()).map(|stop| Pattern::new(stop)).collect();
        StopMatcher { patterns, include_stop, held: String::new() }
    }

    /// Takes the next piece of text.
    pub fn push(&mut self, piece: &str) -> Released {
        let already_held = self.held.len();
        self.held.push_str(piece);
        for (offset, &byte) in piece.as_bytes().iter().enumerate() {
            let mut longest = 0;
            for pattern in &mut self.patterns {
                if pattern.advance(byte) {
                    longest = longest.max(pattern.bytes.len());
                }
            }
            if longest > 0 {
                let end = already_held + offset + 1;
                let keep = if self.include_stop { end } else { end - longest };
                let mut text = std::mem::take(&mut self.held);
                text.truncate(keep);
                return Released { text, stopped: true };
            }
        }
        let hold = self.patterns.iter().map(|pattern| pattern.matched).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - hold);
        Released { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }

    /// The text has ended: what was held back is output after all.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

impl Pattern {
    fn new(stop: &str) -> Pattern {
        let bytes = stop.as_bytes().to_vec();
        let mut failure = vec![0; bytes.len()];
        let mut length = 0;
        for position in 1..bytes.len() {
            while length > 0 && bytes[position] != bytes[length] {
                length = failure[length - 1];
            }
            if bytes[position] == bytes[length] {
                length += 1;
            }
            failure[position] = length;
        }
        Pattern { bytes, failure, matched: 0 }
    }

    /// Takes one byte; true when the whole stop string has just ended.
    fn advance(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.bytes[self.matched] != byte {
            self.matched = self.failure[self.matched - 1];
        }
        if self.bytes[self.matched] == byte {
            self.matched += 1;
        }
        self.matched == self.bytes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition, on a whole text.
    fn reference(text: &str, stops: &[String], include: bool) -> (String, bool) {
        let hit = stops
            .iter()
            .filter_map(|stop| text.find(stop.as_str()).map(|start| (start + stop.len(), start)))
            .min();
        match hit {
            Some((end, start)) => (text[..if include { end } else { start }].to_owned(), true),
            None => (text.to_owned(), false),
        }
    }

    fn run(pieces: &[String], stops: &[String], include: bool) -> (String, bool) {
        let mut matcher = StopMatcher::new(stops, include);
        let mut out = String::new();
        for piece in pieces {
            let released = matcher.push(piece);
            out.push_str(&released.text);
            if released.stopped {
                return (out, true);
            }
        }
        out.push_str(&matcher.finish());
        (out, false)
    }

    #[test]
    fn only_text_that_could_become_a_stop_string_is_held_back() {
        let mut matcher = StopMatcher::new(&["<end>".into()], false);
        assert_eq!(matcher.push("hello <e").text, "hello ");
        assert_eq!(matcher.push("m> <en").text, "<em> ");
        assert_eq!(matcher.push("d>x"), Released { text: String::new(), stopped: true });
    }

    proptest! {
        #[test]
        fn any_cut_into_pieces_gives_the_output_of_the_whole_text(
            pieces in prop::collection::vec("[abé]{0,4}", 0..24),
            stops in prop::collection::vec("[abé]{1,5}", 1..4),
            include in any::<bool>(),
        ) {
            let text = pieces.concat();
            prop_assert_eq!(run(&pieces, &stops, include), reference(&text, &stops, include));
        }
    }
}
