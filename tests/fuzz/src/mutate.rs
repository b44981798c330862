//! Inputs from seeds: edits of bytes, of numbers as files and texts have them, of words that the target knows, and of JSON.

use crate::json;
use crate::random::Random;
use std::ops::Range;

/// Longest input, unless a seed is longer.
pub const BYTES_MAX: usize = 128 << 10;

/// A good input, from which others are made.
#[derive(Debug, Clone, Default)]
pub struct Seed {
    /// The input.
    pub bytes: Vec<u8>,
    /// Where in it JSON stands.
    pub json: Vec<Range<usize>>,
}

impl From<Vec<u8>> for Seed {
    fn from(bytes: Vec<u8>) -> Seed {
        Seed { bytes, json: Vec::new() }
    }
}

impl From<&str> for Seed {
    fn from(text: &str) -> Seed {
        Seed::from(text.as_bytes().to_vec())
    }
}

impl From<String> for Seed {
    fn from(text: String) -> Seed {
        Seed::from(text.into_bytes())
    }
}

impl Seed {
    /// A text that is JSON as a whole.
    pub fn json(text: impl Into<String>) -> Seed {
        let bytes = text.into().into_bytes();
        Seed { json: vec![0..bytes.len(); 1], bytes }
    }

    /// A text of which each line is JSON.
    pub fn json_lines(text: &str) -> Seed {
        let mut at = 0;
        let mut json = Vec::new();
        for line in text.split_inclusive('\n') {
            json.push(at..at + line.trim_end().len());
            at += line.len();
        }
        Seed { bytes: text.as_bytes().to_vec(), json }
    }
}

/// What a target knows about its inputs.
#[derive(Debug, Default)]
pub struct Corpus {
    /// Good inputs.
    pub seeds: Vec<Seed>,
    /// Words that mean something in them.
    pub words: Vec<Vec<u8>>,
    /// Makes lengths and checksums right again, so that not every edit ends at them.
    pub repair: Option<fn(&mut [u8])>,
    /// Longest input; [`BYTES_MAX`] where there is none.
    pub bytes_max: Option<usize>,
}

impl Corpus {
    /// Input number `index` of the campaign `seed`: the first ones are the seeds themselves.
    pub fn input(&self, seed: u64, index: u64) -> Vec<u8> {
        if let Some(own) = usize::try_from(index).ok().and_then(|index| self.seeds.get(index)) {
            return own.bytes.clone();
        }
        let mut random = Random::new(seed, index);
        if self.seeds.is_empty() {
            return (0..random.length(4096)).map(|_| random.bits() as u8).collect();
        }
        let from = random.pick(&self.seeds);
        let mut bytes = from.bytes.clone();
        let by_json = !from.json.is_empty() && !random.one_in(3);
        if by_json {
            let region = random.pick(&from.json).clone();
            if let Some(edited) = json::edited(&bytes[region.clone()], &self.words, &mut random) {
                bytes.splice(region, edited);
            }
        }
        let edits = if by_json { random.below(3) } else { 1 + random.length(7) };
        for _ in 0..edits {
            self.edit(&mut bytes, &mut random);
        }
        bytes.truncate(self.bytes_max.unwrap_or(BYTES_MAX).max(from.bytes.len()));
        if let Some(repair) = self.repair.filter(|_| !random.one_in(8)) {
            repair(&mut bytes);
        }
        bytes
    }

    fn edit(&self, bytes: &mut Vec<u8>, random: &mut Random) {
        let at = random.below(bytes.len() + 1);
        // Of a long input mostly the beginning is read: headers are there.
        let at = if random.one_in(2) { random.length(bytes.len().max(1)).min(bytes.len()) } else { at };
        match random.below(16) {
            0 => flip(bytes, at, random),
            1 => bytes.truncate(at),
            2 => {
                let end = at + random.length(bytes.len() - at);
                bytes.drain(at..end);
            }
            3 => {
                let more = random.length(256);
                let byte = random.bits() as u8;
                bytes.splice(at..at, std::iter::repeat_n(byte, more));
            }
            4 => repeat(bytes, at, random),
            5 | 6 => number(bytes, at, random),
            7 | 8 => digits(bytes, at, random),
            9..12 if !self.words.is_empty() => {
                let word = random.pick(&self.words).clone();
                let over = if random.one_in(2) { word.len().min(bytes.len() - at) } else { 0 };
                bytes.splice(at..at + over, word);
            }
            12 => {
                let other = random.pick(&self.seeds).bytes.clone();
                let from = random.below(other.len() + 1);
                let to = from + random.length(other.len() - from);
                let over = random.length(bytes.len() - at).min(bytes.len() - at);
                bytes.splice(at..at + over, other[from..to].iter().copied());
            }
            13 => {
                for byte in bytes.iter_mut().skip(at).take(1 + random.below(8)) {
                    *byte = random.bits() as u8;
                }
            }
            14 => swap(bytes, random),
            _ => flip(bytes, at, random),
        }
    }
}

fn flip(bytes: &mut [u8], at: usize, random: &mut Random) {
    if let Some(byte) = bytes.get_mut(at) {
        *byte ^= 1 << random.below(8);
    }
}

/// A piece many times over.
fn repeat(bytes: &mut Vec<u8>, at: usize, random: &mut Random) {
    let piece = bytes[at..at + random.length(bytes.len() - at).min(bytes.len() - at)].to_vec();
    let times = random.length(BYTES_MAX / piece.len().max(1)).min(4096);
    bytes.splice(at..at, piece.repeat(times));
}

/// A number of 1 to 8 bytes, little- or, seldom, big-endian.
fn number(bytes: &mut [u8], at: usize, random: &mut Random) {
    let width = 1 << random.below(4);
    let at = if random.one_in(2) { at / width * width } else { at };
    let length = bytes.len() as u64;
    let Some(place) = bytes.get_mut(at..at + width) else { return };
    let mut old = [0; 8];
    old[..width].copy_from_slice(place);
    let near = if random.one_in(3) { length } else { u64::from_le_bytes(old) };
    let new = random.odd_number(near);
    if random.one_in(8) {
        place.copy_from_slice(&new.to_be_bytes()[8 - width..]);
    } else {
        place.copy_from_slice(&new.to_le_bytes()[..width]);
    }
}

/// Another number where a text has one.
fn digits(bytes: &mut Vec<u8>, at: usize, random: &mut Random) {
    let is_digit = |at: &usize| bytes[*at].is_ascii_digit();
    let Some(start) = (at..bytes.len()).find(is_digit) else { return };
    let end = (start..bytes.len()).find(|at| !is_digit(at)).unwrap_or(bytes.len());
    let old = std::str::from_utf8(&bytes[start..end]).ok().and_then(|text| text.parse().ok());
    let new = match random.below(6) {
        0 => format!("-{}", random.odd_number(0)),
        1 => "1e999".to_owned(),
        2 => "9".repeat(random.length(64)),
        _ => random.odd_number(old.unwrap_or(0)).to_string(),
    };
    bytes.splice(start..end, new.into_bytes());
}

/// Two pieces change places.
fn swap(bytes: &mut [u8], random: &mut Random) {
    let half = bytes.len() / 2;
    let length = random.length(half).min(half);
    if length > 0 {
        let first = random.below(half - length + 1);
        let second = half + random.below(bytes.len() - half - length + 1);
        let (left, right) = bytes.split_at_mut(second);
        left[first..first + length].swap_with_slice(&mut right[..length]);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_input_is_a_function_of_seed_and_number_and_bounded() {
        let corpus = Corpus {
            seeds: vec!["{\"a\": 17}".into(), Seed::json("{\"b\":[1,2]}"), vec![0; 100].into()],
            words: vec![b"word".to_vec()],
            ..Corpus::default()
        };
        let inputs = |seed| (0..20_000).map(move |index| (seed, index));
        let mut different = 0;
        for (seed, index) in inputs(1) {
            let input = corpus.input(seed, index);
            assert_eq!(input, corpus.input(seed, index));
            assert!(input.len() <= BYTES_MAX);
            different += usize::from(input != corpus.input(seed + 1, index));
        }
        assert!(different > 19_000, "{different}");
        assert_eq!(corpus.input(1, 2), vec![0; 100]);
    }
}
