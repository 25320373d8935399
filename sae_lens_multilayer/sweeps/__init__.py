"""Many runs that differ in some settings: trained, evaluated, analysed, compared."""
