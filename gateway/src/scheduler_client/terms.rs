//! Which schedulers a gateway listens to.

use ashlar_vocabulary::LeaseTerm;

/// The highest term of which a gateway has heard in its life. Pure; the connection, the simulation and the protocol's model all
/// run this.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Terms {
    highest: LeaseTerm,
}

impl Terms {
    /// Hears of a term, as the first thing over a connection and whenever the cluster changes.
    ///
    /// # Errors
    /// The higher term that has been heard of: the one who says this leads no more, and is to be told so.
    pub fn hear(&mut self, term: LeaseTerm) -> Result<(), LeaseTerm> {
        if term < self.highest {
            return Err(self.highest);
        }
        self.highest = term;
        Ok(())
    }

    /// The highest one; 0 before any.
    pub fn highest(&self) -> LeaseTerm {
        self.highest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lower_terms_are_refused() {
        let mut terms = Terms::default();
        assert_eq!(terms.hear(LeaseTerm(3)), Ok(()));
        assert_eq!(terms.hear(LeaseTerm(3)), Ok(()));
        assert_eq!(terms.hear(LeaseTerm(2)), Err(LeaseTerm(3)));
        assert_eq!(terms.hear(LeaseTerm(4)), Ok(()));
        assert_eq!(terms.highest(), LeaseTerm(4));
    }
}
