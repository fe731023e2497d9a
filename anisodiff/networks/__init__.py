"""Networks: EDM's U-Nets and the layers that they are made of."""
