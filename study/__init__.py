"""The paper's comparisons on the embedded world; results/ keeps what they found."""
